"""Write an adapter in another program's format: first into a scratch folder, then to where the user wants it."""

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from tunerkit.errors import FileError, PluginError, TunerkitError, shown
from tunerkit.injection import Tuner
from tunerkit.paths import few
from tunerkit.records import Format
from tunerkit.serialization.formats import asked, sniffs
from tunerkit.serialization.replacing import sync
from tunerkit.serialization.safetensors_file import checked_path
from tunerkit.serialization.scratch import scratch_in

SCRATCH: Final = ".tunerkit-"
_OLDER: Final = "older"
# A file that people write too. It is replaced only if it has this text, which formats put into theirs.
CARD: Final = "README.md"
MARK: Final = b"<!-- written by tunerkit -->"


def write_format(tuner: Tuner, path: str | os.PathLike[str], format: Format, options: object) -> Path:
    """Write one adapter, and return the path of the file or of the folder.

    A new folder appears whole or not at all. In a folder that exists, all files are replaced, or none. If the process
    is killed in between, the next call puts the older files back before it replaces them.

    Args:
        tuner: The adapter's handle.
        path: A folder; or a file, if the format writes one file, and the path ends as that does.
        format: The format.
        options: An object of its class of options.

    Raises:
        FileError: The files cannot be written, or others are there already. These are unchanged.
    """
    place = checked_path(path)
    try:
        with _folder_for(place) as scratch:
            whole, older = scratch / "whole", scratch / _OLDER  # the scratch folder itself is closed to other users
            whole.mkdir()
            older.mkdir()
            written = _written(format, tuner, whole, options)
            for file in written:
                sync(file)
            return _publish(written, whole, older, place, format)
    except TunerkitError:  # some of these are ValueErrors too
        raise
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise FileError(
            f"cannot write {place}: {reason}. Nothing was changed. Pass a folder in which you may create files"
        ) from error


@contextmanager
def _folder_for(place: Path) -> Iterator[Path]:
    """Yield a scratch folder on the file system of ``place``, and create the folders above; undo both if it fails."""
    above = place if place.is_dir() else place.parent  # a file can be renamed only within one file system
    missing = [folder for folder in (above, *above.parents) if not folder.exists()]
    above.mkdir(parents=True, exist_ok=True)
    try:
        with scratch_in(above, SCRATCH, recover=_put_back_older) as scratch:
            yield scratch
    except BaseException:
        for folder in missing:
            with suppress(OSError):  # somebody else's file is in it
                folder.rmdir()
        raise


def _put_back_older(scratch: Path) -> None:
    """Put back what a writer that was killed had set aside: the older adapter is whole again then."""
    for file in sorted((scratch / _OLDER).glob("*")):
        os.replace(file, scratch.parent / file.name)


def _written(format: Format, tuner: Tuner, folder: Path, options: object) -> list[Path]:
    """Let the plugin write, and check that it names the files that it wrote, each directly in the folder."""
    answer: Any = asked(format, "write", lambda: format.write(tuner, folder, options))
    try:
        names = sorted(Path(each).name for each in answer)
    except TypeError:
        names = []
    there = sorted(file.name for file in folder.iterdir() if file.is_file())
    if not names or names != there or len(there) < len(list(folder.iterdir())):
        raise PluginError(
            f"write of format {format.name!r} returned {shown(answer)}, and wrote {few(there, shown=5) or 'nothing'}; "
            "it must return the files that it wrote, all directly in the folder that it was given"
        )
    return [folder / name for name in names]


def _publish(written: Sequence[Path], whole: Path, older: Path, place: Path, format: Format) -> Path:
    """Move the files to ``place``: a file if one of them ends as it does, else a folder."""
    into = place.is_dir()
    if len(written) == 1 and place.suffix == written[0].suffix and not into:
        _replace({written[0]: place}, older, place, format)
        return place
    if place.suffix in {file.suffix for file in written} and not into:
        raise FileError(
            f"cannot write {place}: format {format.name!r} writes several files ("
            f"{few([file.name for file in written], shown=5)}), so pass a folder"
        )
    if place.exists() and not into:
        raise FileError(f"cannot write {place}: it is a file, and format {format.name!r} writes into a folder")
    if not into:
        os.rename(whole, place)
        sync(place.parent)
        return place
    kept = place / CARD
    moves = {file: place / file.name for file in written}
    if kept.is_file() and MARK not in kept.read_bytes():
        moves = {file: new for file, new in moves.items() if new != kept}
    _replace(moves, older, place, format)
    return place


def _replace(moves: dict[Path, Path], older: Path, place: Path, format: Format) -> None:
    """Move all files to their places, or none: those that they replace are set aside first."""
    taken = [new for new in moves.values() if os.path.lexists(new)]
    adapters = [new for new in taken if new.name != CARD]
    if [new for new in taken if new.is_dir()] or (adapters and not sniffs(format, place)):
        raise FileError(
            f"cannot write {place}: {few([new.name for new in taken], shown=5)} is there already and is no adapter in "
            f"format {format.name!r}. Nothing was changed. Pass another path, or delete it first"
        )
    try:
        for new in taken:
            os.replace(new, older / new.name)
        for file, new in moves.items():
            aside = older / new.name
            if aside.is_file():
                file.chmod(stat.S_IMODE(aside.stat().st_mode) & 0o777)
            os.replace(file, new)
    except BaseException:
        for new in moves.values():
            if os.path.lexists(aside := older / new.name):
                os.replace(aside, new)
            elif new not in taken:
                new.unlink(missing_ok=True)
        raise
    sync(place if place.is_dir() else place.parent)
