"""One safetensors file: where it lies, its bytes from tensors, and its tensors from bytes."""

import functools
import json
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import attrs
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tunerkit.errors import FileError, half_character, shown
from tunerkit.serialization.replacing import replace

_SUFFIX = ".safetensors"
_METADATA = "__metadata__"
_STORED = (
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex64"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
)  # dtypes of torch that a file may hold, each value in bytes of its own
_MOST_DIMENSIONS = 64  # torch's own limit for most operations
_LONGEST_HEADER = 100_000_000  # bytes: the limit of the safetensors library
# What it raises, what torch raises for its dtypes and shapes, and what reading JSON raises.
_UNREADABLE = (safetensors.SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError, AssertionError)


def file_at(path: str | os.PathLike[str], content: str) -> Path:
    """Return ``path`` if it ends in ``.safetensors``, else the file for ``content`` in that folder.

    Args:
        path: The file or the folder.
        content: The kind of file: ``"adapter"`` or ``"state"``.
    """
    place = checked_path(path)
    return place if place.suffix == _SUFFIX else place / f"{content}{_SUFFIX}"


def checked_path(path: str | os.PathLike[str]) -> Path:
    """Return a path, or raise `FileError` for what cannot be one."""
    try:
        place = Path(path)
    except TypeError:
        found = f"{type(path).__name__} {shown(path)}"
        raise FileError(f"expected the path of a folder or a file, got {found}") from None
    if "\0" in str(place):
        raise FileError(f"a path cannot contain the character NUL, got {shown(str(place))}")
    return place


@attrs.frozen(eq=False)
class Packed:
    """Tensors as a safetensors file stores them.

    Attributes:
        fields: The entries of the file's header: the dtype, shape and place of each tensor.
        stored: The bytes of each tensor by its name, in the order of the file.
    """

    fields: dict[str, Any]
    stored: dict[str, memoryview]


def pack(tensors: Mapping[str, Tensor]) -> Packed:
    """Pack tensors for a file without metadata. Their bytes are not copied, unless the tensors are spread out."""
    # The library orders tensors and names their dtypes, also where they hold nothing; it would copy all bytes twice.
    content = safetensors.torch.save({name: tensor.new_empty(0, device="cpu") for name, tensor in tensors.items()})
    entries: dict[str, Any] = json.loads(content[8:])
    stored = {name: _bytes_of(tensors[name]) for name in entries}
    ends = list(accumulate(map(len, stored.values())))
    for (name, data), end in zip(stored.items(), ends, strict=True):
        entries[name] |= {"shape": list(tensors[name].shape), "data_offsets": [end - len(data), end]}
    return Packed(entries, stored)


def _bytes_of(tensor: Tensor) -> memoryview:
    if not tensor.numel():
        return memoryview(b"")
    found: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return found


def write(path: Path, packed: Packed, metadata: Mapping[str, str]) -> Path:
    """Write a safetensors file, completely or not at all, and return its path."""
    if os.path.isdir(path):
        raise FileError(f"cannot write {path}: it is a folder; a path that ends in {_SUFFIX} names the file")
    # The metadata is sorted, so that equal adapters give equal bytes; safetensors writes it in random order.
    fields = {_METADATA: dict(sorted(metadata.items())), **packed.fields}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    replace(path, (len(text).to_bytes(8, "little") + text, *packed.stored.values()))
    return path


def read(
    path: Path, accept: Callable[[Mapping[str, str], Collection[str]], None]
) -> tuple[dict[str, Tensor], dict[str, str], Packed]:
    """Return the tensors of a safetensors file, on the CPU, its metadata, and its bytes.

    The file is opened once and read into memory, where the tensors lie. So header and data are of one file even if
    another one is renamed over it meanwhile, and a file that is cut later does no harm.

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
            data = bytearray(max(0, os.fstat(file.fileno()).st_size - len(head)))
            if file.readinto(data) < len(data):
                raise ValueError("it was cut while it was read")
        entries = {name: entry for name, entry in fields.items() if name != _METADATA}
        stored = _parts(entries, data)
        return (
            {name: _view(entries[name], part) for name, part in stored.items()},
            _metadata_of(fields),
            Packed(fields, stored),
        )
    except FileError:
        raise
    except _UNREADABLE as error:
        raise FileError(f"{path} cannot be read as a safetensors file: {error}") from error


def _parts(entries: Mapping[str, Any], data: bytearray) -> dict[str, memoryview]:
    """Return the bytes of each tensor. Raises `ValueError` unless they follow each other and fill the file."""
    found, end = {}, 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        start, after = entry["data_offsets"]
        size = _count(name, entry["shape"]) * _dtypes()[entry["dtype"]].itemsize
        if start != end or after != start + size:
            raise ValueError(f"its header has a wrong place for {shown(name)}")
        found[name], end = memoryview(data)[start:after], after
    if end != len(data):
        raise ValueError(f"its header places {end} bytes of tensors, and it has {len(data)}")
    return found


def _count(name: str, shape: Sequence[int]) -> int:
    """How many values a tensor has. Raises `ValueError` for a shape that torch has no tensor of.

    The check comes before the multiplication: a header of some megabytes can hold so many and so long dimensions that
    their product takes minutes.
    """
    if len(shape) > _MOST_DIMENSIONS or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise ValueError(f"its header has a shape for {shown(name)} that no tensor has: {shown(shape)}")
    return math.prod(shape)


def _view(entry: Mapping[str, Any], part: memoryview) -> Tensor:
    """Return a tensor at its bytes, which are not copied."""
    dtype, shape = _dtypes()[entry["dtype"]], entry["shape"]
    return torch.frombuffer(part, dtype=dtype).reshape(shape) if len(part) else torch.empty(shape, dtype=dtype)


@functools.cache
def _dtypes() -> dict[str, torch.dtype]:
    """The dtypes of tensors by their names in a file, as the library gives them."""
    content = safetensors.torch.save({name: torch.empty(0, dtype=getattr(torch, name)) for name in _STORED})
    return {entry["dtype"]: getattr(torch, name) for name, entry in json.loads(content[8:]).items()}


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
    if (problem := half_character("".join([*fields, *_metadata_of(fields).values()]))) is not None:
        raise ValueError(f"a text in its header cannot be read: {problem}")
    return size + text, fields


def _metadata_of(fields: Mapping[str, Any]) -> dict[str, str]:
    found = fields.get(_METADATA, {})
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError("its metadata is not a mapping of texts")
    return found
