"""One safetensors file: where it lies, its bytes from tensors, and its tensors from bytes."""

import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import IO, Any

import attrs
import safetensors
import safetensors.torch
from torch import Tensor

from tunerkit.errors import FileError, shown
from tunerkit.serialization.replacing import replace

_SUFFIX = ".safetensors"
_METADATA = "__metadata__"
_LONGEST_HEADER = 100_000_000  # bytes: the limit of the safetensors library
# What it raises, what torch raises for its dtypes and shapes, and what reading JSON raises.
_UNREADABLE = (safetensors.SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError, AssertionError)


def file_at(path: str | os.PathLike[str], content: str) -> Path:
    """Return ``path`` if it ends in ``.safetensors``, else the file for ``content`` in that folder.

    Args:
        path: The file or the folder.
        content: The kind of file: ``"adapter"`` or ``"state"``.
    """
    try:
        place = Path(path)
    except TypeError:
        found = f"{type(path).__name__} {shown(path)}"
        raise FileError(f"expected the path of a folder or a file, got {found}") from None
    if "\0" in str(place):
        raise FileError(f"a path cannot contain the character NUL, got {shown(str(place))}")
    return place if place.suffix == _SUFFIX else place / f"{content}{_SUFFIX}"


@attrs.frozen(eq=False)
class Packed:
    """Tensors as a safetensors file stores them.

    Attributes:
        fields: The entries of the file's header: the dtype, shape and place of each tensor, and the metadata, if any.
        data: The bytes of all tensors.
    """

    fields: dict[str, Any]
    data: memoryview

    @property
    def stored(self) -> dict[str, memoryview]:
        """The bytes of each tensor by its name."""
        places = {name: entry["data_offsets"] for name, entry in self.fields.items() if name != _METADATA}
        return {name: self.data[start:end] for name, (start, end) in places.items()}


def pack(tensors: Mapping[str, Tensor]) -> Packed:
    """Pack tensors for a file without metadata."""
    content = memoryview(safetensors.torch.save(_apart(tensors)))
    end = 8 + int.from_bytes(content[:8], "little")
    return Packed(json.loads(bytes(content[8:end])), content[end:])


def write(path: Path, packed: Packed, metadata: Mapping[str, str]) -> Path:
    """Write a safetensors file, completely or not at all, and return its path."""
    if os.path.isdir(path):
        raise FileError(f"cannot write {path}: it is a folder; a path that ends in {_SUFFIX} names the file")
    # The metadata is sorted, so that equal adapters give equal bytes; safetensors writes it in random order.
    fields = {_METADATA: dict(sorted(metadata.items())), **packed.fields}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    replace(path, (len(text).to_bytes(8, "little") + text, packed.data))
    return path


def read(
    path: Path, accept: Callable[[Mapping[str, str], Collection[str]], None]
) -> tuple[dict[str, Tensor], dict[str, str], Packed]:
    """Return the tensors of a safetensors file, on the CPU, its metadata, and its bytes.

    The file is opened once and read into memory, and the tensors are copied from there. So header and data are of one
    file even if another one is renamed over it meanwhile, and a file that is cut later does no harm. Until this
    caller drops them, the file's bytes are in memory in addition to the tensors.

    Args:
        path: The file.
        accept: Called with the metadata and the tensors' names before the data is read. It raises an error for a file
            that should not be read, such as a large one of another program.

    Raises:
        FileError: The file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            head, fields = _head_of(file)
            accept(_metadata_of(fields), fields.keys() - {_METADATA})
            data = head + file.read()
        return safetensors.torch.load(data), _metadata_of(fields), Packed(fields, memoryview(data)[len(head) :])
    except FileError:
        raise
    except _UNREADABLE as error:
        raise FileError(f"{path} cannot be read as a safetensors file: {error}") from error


def metadata_at(path: Path) -> dict[str, str] | None:
    """Return the metadata of a safetensors file; None if there is no file with a header that can be read."""
    if not os.path.isfile(path):  # unlike pathlib's, it raises for no path
        return None
    try:
        with open(path, "rb") as file:
            return _metadata_of(_head_of(file)[1])
    except _UNREADABLE:
        return None


def _head_of(file: IO[bytes]) -> tuple[bytes, dict[str, Any]]:
    """Read the header of a safetensors file: its bytes with their length before them, and its entries."""
    size = file.read(8)
    length = int.from_bytes(size, "little")
    if len(size) < 8 or not 2 <= length <= min(_LONGEST_HEADER, os.fstat(file.fileno()).st_size - 8):
        raise ValueError("its header is incomplete")
    text = file.read(length)
    try:
        fields = json.loads(text)
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    if not isinstance(fields, dict):
        raise ValueError("its header is not a JSON object")
    return size + text, fields


def _metadata_of(fields: Mapping[str, Any]) -> dict[str, str]:
    found = fields.get(_METADATA, {})
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError("its metadata is not a mapping of texts")
    return found


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give each tensor its own storage: safetensors rejects tied tensors, which a trained copy may contain."""
    storages: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return found
