"""Read one of tunerkit's files, and say what another file is."""

import functools
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from tunerkit import hooks
from tunerkit.errors import FileError
from tunerkit.libraries import ForeignFormat, foreign_format
from tunerkit.paths import few
from tunerkit.serialization.finite import nonfinite
from tunerkit.serialization.header import Header, decode, is_ours
from tunerkit.serialization.safetensors_file import file_at, metadata_at, read as read_file

# The public function that writes each kind of file.
_WRITERS = {"adapter": "save", "state": "save_state"}


def read(path: str | os.PathLike[str], *, content: str) -> tuple[str, dict[str, Tensor], Header]:
    """Return the file's own path for messages, its tensors, and its header after all checks. Raises `FileError`."""
    place = file_at(path, content)
    source = str(place)
    if not os.path.isfile(place):
        _refuse_foreign(place.parent, [place.parent.name, *_names_in(place.parent)], ())
        raise FileError(
            f"there is no file {source}; tunerkit.{_WRITERS[content]} writes {content}.safetensors into the folder "
            "it is given"
        )
    tensors, metadata, packed = read_file(place, functools.partial(_accept, place))
    return source, tensors, decode(metadata, tensors, packed.stored, source=source, content=content)


def refuse_other_file(place: Path) -> None:
    """Raise `FileError` if there is a safetensors file that tunerkit did not write, such as a base model's weights.

    A file whose header cannot be read may be one of tunerkit's that is damaged, and may be replaced.
    """
    metadata = metadata_at(place)
    if metadata is not None and not is_ours(metadata):
        raise FileError(
            f"{place} is a safetensors file that tunerkit did not write, such as the weights of a model. Nothing was "
            "written, and it is unchanged. Save under another name or into another folder, or delete that file first"
        )


def refuse_nonfinite(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor], source: str) -> None:
    """Raise `FileError` if a file's tensors contain NaN or inf where the base's own do not."""
    if wrong := nonfinite(tensors, base):
        raise FileError(
            f"{source} has NaN or inf in {len(wrong)} of {len(tensors)} tensors: {few(wrong, shown=5)}. A model with "
            "them computes nothing useful: load an earlier file. To look at this one, read its tensors with "
            "safetensors.torch.load_file"
        )


def _accept(place: Path, metadata: Mapping[str, str], tensors: Collection[str]) -> None:
    """Refuse a file of another program, before its data is read."""
    if not is_ours(metadata):
        _refuse_foreign(place, [place.name], tensors)
        decode(metadata, {}, source=str(place), content="")


def _refuse_foreign(place: Path, files: Collection[str], tensors: Collection[str]) -> None:
    found: ForeignFormat | None = foreign_format(files, tensors)
    if found is not None:
        raise FileError(
            f"{place} holds an adapter in the format of {found.library}. tunerkit itself does not read it: that takes "
            f"the distribution {found.distribution}{_install(found)}. {found.instead}"
        )


def _install(found: ForeignFormat) -> str:
    if found.format in hooks.gather_formats():
        return ", which is installed and cannot read this: pass the folder or the file that holds the adapter"
    return f" (pip install {found.distribution})"


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (OSError, ValueError):
        return []
