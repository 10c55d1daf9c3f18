"""Files that one process writes for all: the others wait until they are there."""

import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tunerkit.errors import AdapterError, FileError, TunerkitError
from tunerkit.libraries import torch_private
from tunerkit.parallel import group
from tunerkit.parallel.engine import Engine

_KEY: Final = "tunerkit/written"
_PATIENCE: Final = 60.0  # seconds after which a file that process 0 wrote elsewhere counts as the one waited for
# How often process 0 tried to write each, and which of its tries another process saw last: the same place may be
# written again, by the same training or by the next one.
_tries: Counter[str] = Counter()
_seen: Counter[str] = Counter()


def written_once(engine: Engine, place: Path, content: str, write: Callable[[], Path]) -> Path:
    """Let the writer of a training write a file, and return in every process once it is there.

    The writer may also be the only one to call this, since it waits for nobody.

    Args:
        engine: The engine of the training.
        place: The file, as the process was told.
        content: What is written, in the same words in all processes if it is the same.
        write: Writes the file, and returns its path. Only the writer calls it.

    Raises:
        TunerkitError: What writing raised, in every process.
    """
    if not engine.is_shared:
        return write()
    # Processes may name one file by a relative and by an absolute path.
    any_place = f"{_KEY}/{content}"
    key = f"{any_place}/{'/'.join(place.parts[-2:])}"
    if engine.is_writer:
        return _write(key, any_place, write)
    number, kind, text = group.wait_until(_looking(key, any_place, place), f"process 0 to write {place}")
    _seen[key] = number
    if kind is not None:
        raise _KINDS.get(kind, FileError)(f"process 0 could not write {place}: {text}")
    return place


def _write(key: str, any_place: str, write: Callable[[], Path]) -> Path:
    store = torch_private.default_store()
    _tries[key] += 1
    try:
        written = write()
    except BaseException as error:
        store.set(key, json.dumps([_tries[key], type(error).__name__, str(error)]))
        raise
    store.set(key, json.dumps([_tries[key], None, None]))
    store.set(any_place, json.dumps(str(written)))
    return written


def _looking(key: str, any_place: str, place: Path) -> Callable[[], Any]:
    """What looks for the answer of process 0, and is not misled by one that this process saw already."""
    store, started = torch_private.default_store(), time.monotonic()

    def look() -> Any:
        found = json.loads(store.get(key)) if store.check([key]) else None
        if found is not None and found[0] > _seen[key]:
            return found
        if time.monotonic() - started > _PATIENCE and store.check([any_place]):
            raise AdapterError(
                f"process 0 wrote the same to {json.loads(store.get(any_place))}, and process {group.rank()} was told "
                f"{place}: pass the same path in every process"
            )
        return None

    return look


_KINDS: dict[str, type[TunerkitError]] = {kind.__name__: kind for kind in (AdapterError, FileError)}
