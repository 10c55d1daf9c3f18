"""Several processes of one run, as torchrun starts them: all compute, and the first alone prints and writes."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import wraps
from typing import Final, ParamSpec

from tunerkit import TunerkitError

_Given = ParamSpec("_Given")
_GRACE: Final = 10.0  # seconds that the first process has to report an error which all have


def count() -> int:
    """How many processes the launcher has started."""
    found = os.environ.get("WORLD_SIZE", "1")
    return int(found) if found.isdecimal() else 1


def is_first() -> bool:
    """Whether this process prints and writes."""
    return count() <= 1 or os.environ.get("RANK", "0") == "0"


def by_the_first(write: Callable[_Given, None]) -> Callable[_Given, None]:
    """Decorate a function that writes files: in all other processes it does nothing."""

    @wraps(write)
    def written(*args: _Given.args, **kwargs: _Given.kwargs) -> None:
        if is_first():
            write(*args, **kwargs)

    return written


def require_group(environment: Mapping[str, str]) -> None:
    """Raise `TunerkitError` if this is one of several processes that cannot find each other."""
    names = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if count() > 1 and (absent := [name for name in names if name not in environment]):
        raise TunerkitError(
            f"WORLD_SIZE is {count()}, and {absent[0]} is not set, so the processes cannot find each other; start them "
            f"with torchrun --nproc-per-node {count()} -m tunerkit train, or unset WORLD_SIZE"
        )


def wait() -> None:
    """Wait until all processes are here."""
    from tunerkit_transformers.agreement import gathered  # imports torch, as below

    gathered(None)


@contextmanager
def leaving() -> Iterator[None]:
    """At the end of the block, leave the group together: a thread of gloo may abort a process that is still in it."""
    yield
    if count() > 1:
        from torch import distributed

        if distributed.is_initialized():
            wait()
            distributed.destroy_process_group()


def reports_error() -> bool:
    """Whether this process, which has failed, prints why: the first, as a rule, whose end lets the launcher end all."""
    if not is_first():
        time.sleep(_GRACE)
    if count() > 1 and "torch" in sys.modules:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch does not list what it exports

        with suppress(Exception):  # there is no store yet, or no longer
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
            # The others lose their connections by the first failure: theirs is not the reason.
            return store.add(f"tunerkit/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    return True
