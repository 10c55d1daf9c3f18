"""Files that rank 0 writes for all ranks: the others wait for the result, which it puts into the group's store."""

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
from tunerkit.plugin import Engine
from tunerkit_distributed import group, torch_private

_KEY: Final = "tunerkit/written"
_GRACE: Final = 2.0  # seconds between a file and the answer about it
_PATIENCE: Final = 60.0  # seconds after which an equal file that rank 0 wrote to another path is an error


@attrs.frozen(eq=False)
class _Counts:
    """Counts the results in one process group, since a path may be written several times.

    Attributes:
        answers: By path, the number of results that rank 0 has stored, or that another rank has read.
        files: By content, the number of the last file that rank 0 has written, or whose result another rank has read.
    """

    answers: Counter[str] = attrs.field(factory=Counter)
    files: Counter[str] = attrs.field(factory=Counter)


_counts: WeakKeyDictionary[Any, _Counts] = WeakKeyDictionary()  # by the default group, whose store holds the answers


def written_once(engine: Engine, place: Path, content: str, write: Callable[[], Path]) -> Path:
    """Write a file on one rank, and return on every rank once it exists.

    The writer does not wait for the others, and may be the only rank that calls this.

    Args:
        engine: The engine of the training.
        place: The file's path, as passed on this rank.
        content: A key of the content, equal on all ranks.
        write: Writes the file, and returns its path. Only the writer calls it.

    Raises:
        TunerkitError: Writing failed; every rank raises it.
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
    """The result of one attempt of rank 0 to write.

    Attributes:
        file: The number of files written with this content so far.
        error: The name of the error's class; None if the file was written.
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
    """Return a function that returns rank 0's next result for ``key``, or None as long as there is none."""
    started, counts = time.monotonic(), _own_counts()

    def look() -> _Answer | None:
        found = _read(f"{key}/{counts.answers[key] + 1}")
        if found is None and time.monotonic() - started > _PATIENCE:
            other = _read(any_place)
            if other is not None and other.file > counts.files[any_place]:
                raise AdapterError(
                    f"process 0 wrote the same to {other.text}, but process {group.rank()} was given {place}: pass the "
                    "same path in every process"
                )
        return found

    return look


def _catch_up(key: str, any_place: str, place: Path) -> None:
    """Skip results up to the one for ``place``, since rank 0 may have written other files of this name before.

    Otherwise a later call would read one of the older results. If rank 0 has the folder mounted elsewhere, no result
    has this rank's path, and none is skipped.
    """
    counts, started = _own_counts(), time.monotonic()
    number = counts.answers[key]
    while time.monotonic() - started < _GRACE:  # the answer comes after the file
        if (later := _read(f"{key}/{number + 1}")) is None:
            time.sleep(0.01)
            continue
        number += 1
        if later.text == str(place.absolute()):
            counts.answers[key], counts.files[any_place] = number, max(counts.files[any_place], later.file)
            return


def _wait_for(place: Path) -> None:
    """Wait for ``place``, which rank 0 wrote under another path, as through another mount; give up after a minute."""
    started = time.monotonic()

    def look() -> Any:
        return True if place.exists() or time.monotonic() - started > _PATIENCE else None

    group.wait_until(look, f"process 0 to write {place}")


_KINDS: dict[str, type[TunerkitError]] = {kind.__name__: kind for kind in (AdapterError, FileError)}
