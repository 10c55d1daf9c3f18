"""Adapter formats of other programs: detect the format at a path, and write an adapter with a format's plugin."""

import os
from collections.abc import Collection, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final

from tunerkit import hooks
from tunerkit.errors import FileError, PluginError, TunerkitError, UnknownFormatError, closest, shown, warn
from tunerkit.extras import DEFAULT_FORMAT, READERS, distribution, install, reader_of
from tunerkit.injection import Tuner
from tunerkit.paths import few
from tunerkit.records import Format
from tunerkit.serialization.atomic_writing import move, put_back, reason, scratch_in, sync
from tunerkit.serialization.safetensors_file import file_at, is_ours, metadata_at

SCRATCH: Final = ".tunerkit-"
# Users write this file by hand too, so it is replaced only if it contains MARK, as the README.md of our formats do.
CARD: Final = "README.md"
MARK: Final = b"<!-- written by tunerkit -->"


def find_format(name: object) -> Format:
    """Return a format by name. Raises `UnknownFormatError`, which names the format's distribution if it is known."""
    found = hooks.gather_formats()
    if isinstance(name, str) and name in found:
        return found[name]
    known = {each: reader.extra for reader in READERS for each in reader.formats}
    if isinstance(name, str) and name in known:
        needed = f"needs {distribution(known[name])}, which is not installed: {install(known[name])}"
        raise UnknownFormatError(f"format {name!r} {needed}")
    none = f"none (each is a separate distribution, such as {distribution(DEFAULT_FORMAT)})"
    installed = few(sorted(found), shown=20) or none
    raise UnknownFormatError(
        f"no format named {shown(name)}{closest(str(name).lower(), {*found, *known})}; installed: {installed}. "
        "tunerkit's own file is written by tunerkit.save"
    )


def format_at(path: str | os.PathLike[str]) -> Format | None:
    """Return the format of the adapter at ``path``; None for tunerkit's own file, or if no format matches.

    Raises `FileError` if several formats match.
    """
    place = file_at(path, "adapter")
    metadata = metadata_at(place)
    if is_ours(metadata) or (metadata is None and os.path.isfile(place) and place != Path(path)):
        return None  # also for a damaged file of ours, so that its error is reported
    found = [each for each in hooks.gather_formats().values() if sniffs(each, Path(path))]
    if len(found) > 1:
        raise FileError(
            f"{os.fspath(path)} holds adapters in the formats {' and '.join(each.name for each in found)}; pass the "
            "path of one file instead of the folder"
        )
    return found[0] if found else None


def sniffs(format: Format, path: Path) -> bool:
    """Whether a format recognizes the file or folder at ``path``; if its check raises, warn and return False."""
    try:
        return bool(format.sniff(path))
    except Exception as error:
        warn(f"format {format.name!r} failed to check whether {path} is an adapter: {type(error).__name__}: {error}")
        return False


def is_foreign(path: str) -> bool:
    """Whether the file names at ``path`` match another program's adapters; needs no plugin."""
    place = Path(path)
    inside = os.listdir(place) if os.path.isdir(place) else []  # unlike Path.is_dir, never raises
    return reader_of([place.name, *inside]) is not None


def refuse_foreign(place: Path, files: Collection[str], tensors: Collection[str]) -> None:
    """Raise `FileError` if the file and tensor names match another program's adapters."""
    if (found := reader_of(files, tensors)) is not None:
        installed = not hooks.gather_formats().keys().isdisjoint(found.formats)
        reader = distribution(found.extra)
        known = ", which is installed and cannot read this path: pass the folder or the file of the adapter"
        raise FileError(
            f"{place} holds an adapter in the format of {found.program}. Reading it needs the distribution "
            f"{reader}{known if installed else f' ({install(found.extra)})'}. Without it, use {found.instead}"
        )


# --- Writing ----------------------------------------------------------------------------------------------------------


def write_format(tuner: Tuner, place: Path, format: Format, options: object) -> Path:
    """Write one adapter to the folder ``place``; or to a file, if the format writes a single file with this suffix.

    A new folder appears complete or not at all. In an existing folder, all files are replaced or none: see `move`.
    """
    try:
        with ExitStack() as undo:
            above = place if place.is_dir() else place.parent  # a file can be renamed only within one file system
            for folder in reversed((above, *above.parents)):
                if not folder.exists():
                    undo.callback(_remove, folder)
            above.mkdir(parents=True, exist_ok=True)
            with scratch_in(above, SCRATCH, recover=put_back) as scratch:
                whole = scratch / "whole"  # the scratch folder itself is private to this user
                whole.mkdir()
                written = _written(format, tuner, whole, options)
                for file in written:
                    sync(file)
                _publish(written, whole, place, format)
            undo.pop_all()
        return place
    except (OSError, ValueError) as error:
        if isinstance(error, TunerkitError):
            raise
        raise FileError(
            f"cannot write {place}: {reason(error)}. Nothing was changed. Pass a folder in which you may create files"
        ) from error


def _remove(folder: Path) -> None:
    with suppress(OSError):  # not empty: another process wrote into it
        folder.rmdir()


def _written(format: Format, tuner: Tuner, folder: Path, options: object) -> list[Path]:
    """Return the files that the format's plugin writes into ``folder``. Raises `PluginError` for a wrong answer."""
    with hooks.naming(format, "write"):
        answer: Any = format.write(tuner, folder, options)
    try:
        names = sorted(Path(each).name for each in answer)
    except TypeError:
        names = []
    there = sorted(file.name for file in folder.iterdir() if file.is_file())
    if not names or names != there or len(there) < len(list(folder.iterdir())):
        raise PluginError(
            f"write of format {format.name!r} returned {shown(answer)}, and wrote {few(there, shown=5) or 'nothing'}; "
            "it must return all files that it wrote, each directly in the given folder"
        )
    return [folder / name for name in names]


def _publish(written: Sequence[Path], whole: Path, place: Path, format: Format) -> None:
    """Move the written files to ``place``: to a file if it has the suffix of one of them, else into a folder."""
    if place.is_dir():
        moves = {file: place / file.name for file in written}
        kept = place / CARD
        if kept.is_file() and MARK not in kept.read_bytes():
            moves = {file: new for file, new in moves.items() if new != kept}
    elif place.suffix in {file.suffix for file in written}:
        moves = {written[0]: place}
        if len(written) > 1:
            raise FileError(
                f"cannot write {place}: format {format.name!r} writes several files ("
                f"{few([file.name for file in written], shown=5)}), so pass a folder"
            )
    elif place.exists():
        raise FileError(f"cannot write {place}: it is a file, and format {format.name!r} writes into a folder")
    else:
        os.rename(whole, place)
        sync(place.parent)
        return
    taken = [new for new in moves.values() if os.path.lexists(new)]
    adapters = [new for new in taken if new.name != CARD]
    if [new for new in taken if new.is_dir()] or (adapters and not sniffs(format, place)):
        raise FileError(
            f"cannot write {place}: {few([new.name for new in taken], shown=5)} is there already and is no adapter in "
            f"format {format.name!r}. Nothing was changed. Pass another path, or delete it first"
        )
    move(moves, whole.parent)
    sync(place if place.is_dir() else place.parent)
