"""Write an adapter in another program's format: first into a scratch folder, then to where the user wants it."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tunerkit.errors import FileError, PluginError, shown
from tunerkit.injection import Tuner
from tunerkit.paths import few
from tunerkit.records import Format
from tunerkit.serialization.formats import asked, sniffs

# A file that people write too. It is replaced only if it has this text, which formats put into theirs.
_CARD, _MARK = "README.md", b"<!-- written by tunerkit -->"


def write_format(tuner: Tuner, path: str | os.PathLike[str], format: Format, options: object) -> Path:
    """Write one adapter, and return the path of the file or of the folder.

    A new folder appears whole or not at all. In a folder that exists, each file is replaced at once.

    Args:
        tuner: The adapter's handle.
        path: A folder; or a file, if the format writes one file, and the path ends as that does.
        format: The format.
        options: An object of its class of options.

    Raises:
        FileError: The files cannot be written, or others are there already. These are unchanged.
    """
    place = _checked(path)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        # Beside the destination: a file can be renamed only within one file system.
        scratch = Path(tempfile.mkdtemp(dir=place.parent, prefix=".tunerkit-"))
    except (OSError, ValueError) as error:
        raise FileError(
            f"cannot write {place}: {_reason(error)}. Pass a folder in which you may create files"
        ) from error
    try:
        whole = scratch / "whole"  # the scratch folder itself is closed to other users
        whole.mkdir()
        written = _written(format, tuner, whole, options)
        for file in written:
            _flush(file)
        return _publish(written, whole, place, format)
    except OSError as error:
        raise FileError(f"cannot write {place}: {_reason(error)}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _checked(path: str | os.PathLike[str]) -> Path:
    try:
        place = Path(path)
    except TypeError:
        raise FileError(f"expected the path of a folder or a file, got {type(path).__name__} {shown(path)}") from None
    if "\0" in str(place):
        raise FileError(f"a path cannot contain the character NUL, got {shown(str(place))}")
    return place


def _written(format: Format, tuner: Tuner, folder: Path, options: object) -> list[Path]:
    """Let the plugin write, and check that it names the files that it wrote, each directly in the folder."""
    answer = asked(format, "write", lambda: [Path(each) for each in format.write(tuner, folder, options)])
    there = set(folder.iterdir())
    if not answer or set(answer) != there or not all(file.is_file() for file in there):
        names = few(sorted(each.name for each in there), shown=5)
        raise PluginError(
            f"write of format {format.name!r} returned {shown([each.name for each in answer])}, and wrote {names}; it "
            "must return the files that it wrote, all directly in the folder that it was given"
        )
    return answer


def _publish(written: Sequence[Path], whole: Path, place: Path, format: Format) -> Path:
    """Move the files to ``place``: a file if one of them ends as it does, else a folder."""
    if len(written) == 1 and place.suffix == written[0].suffix and not place.is_dir():
        _refuse_others([place], place, format)
        os.replace(written[0], place)
        return place
    if place.suffix in {file.suffix for file in written} and not place.is_dir():
        raise FileError(
            f"cannot write {place}: format {format.name!r} writes several files ({few(_names(written), shown=5)}), so "
            "pass a folder"
        )
    if place.exists() and not place.is_dir():
        raise FileError(f"cannot write {place}: it is a file, and format {format.name!r} writes into a folder")
    if not place.exists():
        os.rename(whole, place)
        return place
    taken = [place / file.name for file in written if (place / file.name).exists()]
    _refuse_others([file for file in taken if file.name != _CARD], place, format)
    for file in sorted(written):
        if file.name != _CARD or _MARK in _content(place / _CARD):
            os.replace(file, place / file.name)
    return place


def _refuse_others(taken: Sequence[Path], place: Path, format: Format) -> None:
    """Raise `FileError` unless the files that would be replaced are an adapter in the same format."""
    if any(file.exists() for file in taken) and not sniffs(format, place):
        raise FileError(
            f"cannot write {place}: {few(_names(taken), shown=5)} is there already and is no adapter in format "
            f"{format.name!r}. Nothing was changed. Pass another path, or delete it first"
        )


def _content(file: Path) -> bytes:
    """What a file holds; the mark if there is none, so that a new one is written."""
    return file.read_bytes() if file.exists() else _MARK


def _names(files: Sequence[Path]) -> list[str]:
    return [file.name for file in files]


def _flush(file: Path) -> None:
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())


def _reason(error: OSError | ValueError) -> str:
    return str((error.strerror if isinstance(error, OSError) else None) or error)
