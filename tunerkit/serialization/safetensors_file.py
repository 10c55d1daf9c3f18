"""One safetensors file: where it lies, its bytes from tensors, and its tensors from bytes."""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tunerkit.errors import FileError, half_character, shown
from tunerkit.injection import Tuner
from tunerkit.serialization.atomic_writing import replace

_SUFFIX = ".safetensors"
_METADATA = "__metadata__"
# What a file may hold, by the names that safetensors gives them: each value is in bytes of its own.
_DTYPES = {
    **{"BOOL": torch.bool, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64},
    **{"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "C64": torch.complex64},
    **{"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E8M0": torch.float8_e8m0fnu},
    **{"F8_E5M2": torch.float8_e5m2, "F8_E5M2FNUZ": torch.float8_e5m2fnuz},
}
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


def pack(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, memoryview]]:
    """Return the entries of a file's header, and the bytes of each tensor, both by name in the order of the file.

    Bytes are not copied, unless the tensors are spread out.
    """
    # The library orders tensors and names their dtypes, also where they hold nothing; it would copy all bytes twice.
    content = safetensors.torch.save({name: tensor.new_empty(0, device="cpu") for name, tensor in tensors.items()})
    entries: dict[str, Any] = json.loads(content[8:])
    stored = {name: bytes_of(tensors[name]) for name in entries}
    ends = list(accumulate(map(len, stored.values())))
    for (name, data), end in zip(stored.items(), ends, strict=True):
        entries[name] |= {"shape": list(tensors[name].shape), "data_offsets": [end - len(data), end]}
    return entries, stored


def bytes_of(tensor: Tensor) -> memoryview:
    """Return a tensor's values as a file stores them."""
    if not tensor.numel():
        return memoryview(b"")
    found: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return found


def write(
    path: Path, entries: Mapping[str, Any], stored: Mapping[str, memoryview], metadata: Mapping[str, str]
) -> Path:
    """Write a safetensors file of what `pack` returned, completely or not at all, and return its path."""
    if os.path.isdir(path):
        raise FileError(f"cannot write {path}: it is a folder; a path that ends in {_SUFFIX} names the file")
    # The metadata is sorted, so that equal adapters give equal bytes; safetensors writes it in random order.
    fields = {_METADATA: dict(sorted(metadata.items())), **entries}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    replace(path, (len(text).to_bytes(8, "little") + text, *stored.values()))
    return path


def read(
    path: Path, accept: Callable[[Mapping[str, str], Collection[str]], None]
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, memoryview]]:
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
            head, entries, metadata = _head_of(file)
            accept(metadata, entries.keys())
            data = bytearray(max(0, os.fstat(file.fileno()).st_size - len(head)))
            if file.readinto(data) < len(data):
                raise ValueError("it was cut while it was read")
        stored = _parts(entries, data)
        tensors = {}
        for name, part in stored.items():  # whose bytes are not copied
            dtype, shape = _DTYPES[entries[name]["dtype"]], entries[name]["shape"]
            values = torch.frombuffer(part, dtype=dtype) if len(part) else torch.empty(0, dtype=dtype)
            tensors[name] = values.reshape(shape)
        return tensors, metadata, stored
    except FileError:
        raise
    except _UNREADABLE as error:
        raise FileError(f"{path} cannot be read as a safetensors file: {error}") from error


def _parts(entries: Mapping[str, Any], data: bytearray) -> dict[str, memoryview]:
    """Return the bytes of each tensor. Raises `ValueError` unless they follow each other and fill the file."""
    found, end = {}, 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        start, after = entry["data_offsets"]
        size = _count(name, entry["shape"]) * _DTYPES[entry["dtype"]].itemsize
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


def metadata_at(path: Path) -> dict[str, str] | None:
    """Return the metadata of a safetensors file; None if there is no file with a header that can be read."""
    if not os.path.isfile(path):  # unlike pathlib's, it raises for no path
        return None
    try:
        with open(path, "rb") as file:
            return _head_of(file)[2]
    except _UNREADABLE:
        return None


def _head_of(file: IO[bytes]) -> tuple[bytes, dict[str, Any], dict[str, str]]:
    """Read the header of a safetensors file: its bytes with their length before them, its entries and its metadata."""
    size = file.read(8)
    length = int.from_bytes(size, "little")
    if len(size) < 8 or not 2 <= length <= min(_LONGEST_HEADER, os.fstat(file.fileno()).st_size - 8):
        raise ValueError("its header is incomplete")
    text = file.read(length)
    try:
        entries = json.loads(text)
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    if not isinstance(entries, dict):
        raise ValueError("its header is not a JSON object")
    metadata = entries.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not a mapping of texts")
    if (problem := half_character("".join([*entries, *metadata.values()]))) is not None:
        raise ValueError(f"a text in its header cannot be read: {problem}")
    return size + text, entries, metadata


# --- Folders of a checkpoint ------------------------------------------------------------------------------------------


def folder_of(checkpoint: Path, tuners: Sequence[Tuner], tuner: Tuner) -> Path:
    """Return the folder of one adapter's files: the checkpoint itself if it is the only one, else a subfolder.

    If a subfolder exists because there were several adapters, it is used even after the others were deleted.

    It has the adapter's name, if every file system can store and distinguish that, or a digest of it: names may contain
    any character but "." and "/", and some file systems do not distinguish "a" from "A". The dot in front of a digest
    keeps it apart from every name.
    """
    digest = hashlib.sha256(tuner.name.encode()).hexdigest()[:16]
    named = checkpoint / (tuner.name if re.fullmatch(r"[a-z0-9_-]+", tuner.name) else f"name.{digest}")
    # Earlier versions used the bare digest. If that is the name of another adapter, the folder is that one's.
    older = checkpoint / digest
    if has_file(older, "adapter") and not has_file(named, "adapter") and digest not in {t.name for t in tuners}:
        named = older
    return named if len(tuners) > 1 or has_file(named, "adapter") else checkpoint


def has_file(folder: Path, content: str) -> bool:
    """Whether the folder contains a file of this kind, ``"adapter"`` or ``"state"``."""
    return file_at(folder, content).is_file()
