"""How processes of one group are started, join it, and leave it."""

import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

# What a server of processes imports. Names that are not installed are passed by.
PRELOADED = ["torch._dynamo", "tunerkit_testing.resuming", "tunerkit_testing.loaded"]
_MINUTES = 20  # until a process gives up on the other one, on a machine that is busy with other things


def spawn(
    function: Callable[..., None], arguments: Sequence[object], processes: int = 2, *, afresh: bool = False
) -> None:
    """Call ``function(rank, *arguments)`` in forks of a server that has imported torch, or ``afresh``; wait."""
    has_server = "forkserver" in multiprocessing.get_all_start_methods()
    method = "forkserver" if has_server and not afresh else "spawn"
    if method == "forkserver":
        # There is one server in a process, and the first who uses it decides what its forks need not import again.
        multiprocessing.get_context(method).set_forkserver_preload(PRELOADED)
    start: Any = torch.multiprocessing  # torch does not list what it exports
    given = (function, dict(os.environ), tuple(arguments))
    start.start_processes(_called, given, nprocs=processes, start_method=method)


def _called(
    rank: int, function: Callable[..., None], environment: Mapping[str, str], arguments: Sequence[object]
) -> None:
    os.environ.clear()
    os.environ.update(environment)  # the server has that of the time when it was started
    function(rank, *arguments)


@contextmanager
def joined(rank: int, folder: str, processes: int = 2) -> Iterator[None]:
    """Inside the block this is one of ``processes`` of one thread that meet in ``folder``; at its end it exits."""
    torch.set_num_threads(1)
    gc.freeze()  # a Trainer collects garbage, which would take longer than a training among all that is imported
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=processes,
        timeout=timedelta(minutes=_MINUTES),
    )
    yield
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
    # A thread of gloo that drops its last tensor while the interpreter ends aborts the process ("terminate called
    # without an active exception", pytorch/pytorch#179291), though all is written. With the group its threads end, but
    # a model may still refer to it. An error above leaves the block as usual, and spawn reports it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
