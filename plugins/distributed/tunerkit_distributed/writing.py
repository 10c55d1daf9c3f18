"""Files that one process writes for all: the others wait until they are there."""

import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from weakref import WeakKeyDictionary

import attrs
from torch import distributed

from tunerkit.errors import AdapterError, FileError, TunerkitError
from tunerkit.hooks import Engine
from tunerkit_distributed import group, torch_private

_KEY: Final = "tunerkit/written"
_GRACE: Final = 2.0  # seconds from a file to the answer about it
_PATIENCE: Final = 60.0  # seconds after which a file that process 0 wrote elsewhere counts as the one waited for


@attrs.frozen(eq=False)
class _Counts:
    """What a process has written, or been told of, since its process group was made: a place may be written again.

    Attributes:
        answers: How many answers about a place process 0 has given, or another process has taken.
        files: The number of the last file with some content that process 0 has written, or another process knows of.
    """

    answers: Counter[str] = attrs.field(factory=Counter)
    files: Counter[str] = attrs.field(factory=Counter)


_counts: WeakKeyDictionary[Any, _Counts] = WeakKeyDictionary()  # by the default group, whose store has the answers


def written_once(engine: Engine, place: Path, content: str, write: Callable[[], Path]) -> Path:
    """Let the writer of a training write a file, and return in every process once it is there.

    The writer waits for nobody, and may also be the only one to call this.

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
    any_place = f"{_KEY}/{content}"
    key = f"{any_place}/{'/'.join(place.parts[-2:])}"  # a path may be relative in one process and absolute in another
    if engine.is_writer:
        return _write(key, any_place, write)
    answer = group.wait_until(_looking(key, any_place, place), f"process 0 to write {place}")
    counts = _own_counts()
    counts.answers[key] += 1
    counts.files[any_place] = max(counts.files[any_place], answer.file)
    if answer.error is not None:
        raise _KINDS.get(answer.error, FileError)(f"process 0 could not write {place}: {answer.text}")
    if Path(answer.text) != place.absolute():
        _wait_for(place)
        _catch_up(key, any_place, place)
    return place


@attrs.frozen
class _Answer:
    """What process 0 says of one attempt to write.

    Attributes:
        file: The number of the last file with this content that it has written.
        error: The class of the error; None if the file is there.
        text: The path of the file, or the text of the error.
    """

    file: int
    error: str | None
    text: str


def _write(key: str, any_place: str, write: Callable[[], Path]) -> Path:
    files = _own_counts().files
    try:
        written = write()
    except BaseException as error:
        _give(key, _Answer(files[any_place], type(error).__name__, str(error)))
        raise
    files[any_place] += 1
    answer = _Answer(files[any_place], None, str(written.absolute()))
    _give(key, answer)
    torch_private.default_store().set(any_place, json.dumps(attrs.astuple(answer)))
    return written


def _give(key: str, answer: _Answer) -> None:
    answers = _own_counts().answers
    answers[key] += 1
    torch_private.default_store().set(f"{key}/{answers[key]}", json.dumps(attrs.astuple(answer)))


def _own_counts() -> _Counts:
    return _counts.setdefault(distributed.group.WORLD, _Counts())


def _read(key: str) -> _Answer | None:
    store = torch_private.default_store()
    return _Answer(*json.loads(store.get(key))) if store.check([key]) else None


def _looking(key: str, any_place: str, place: Path) -> Callable[[], _Answer | None]:
    """What looks for the next answer of process 0 that this process has not taken yet."""
    started, counts = time.monotonic(), _own_counts()

    def look() -> _Answer | None:
        found = _read(f"{key}/{counts.answers[key] + 1}")
        if found is None and time.monotonic() - started > _PATIENCE:
            other = _read(any_place)
            if other is not None and other.file > counts.files[any_place]:
                raise AdapterError(
                    f"process 0 wrote the same to {other.text}, and process {group.rank()} was told {place}: pass the "
                    "same path in every process"
                )
        return found

    return look


def _catch_up(key: str, any_place: str, place: Path) -> None:
    """Go on behind the answer about ``place``: process 0 may have written files of this name alone before.

    Else a later wait would take its last file for one that was written since. Through another mount no answer has the
    path of this process, and none is left out.
    """
    counts, started = _own_counts(), time.monotonic()
    number = counts.answers[key]
    while time.monotonic() - started < _GRACE:  # it answers after the file is there
        if (later := _read(f"{key}/{number + 1}")) is None:
            time.sleep(0.01)
            continue
        number += 1
        if later.text == str(place.absolute()):
            counts.answers[key], counts.files[any_place] = number, max(counts.files[any_place], later.file)
            return


def _wait_for(place: Path) -> None:
    """Wait for a file that process 0 calls by another path: through another mount, or it has written another one."""
    started = time.monotonic()

    def look() -> Any:
        return True if place.exists() or time.monotonic() - started > _PATIENCE else None

    group.wait_until(look, f"process 0 to write {place}")


_KINDS: dict[str, type[TunerkitError]] = {kind.__name__: kind for kind in (AdapterError, FileError)}
