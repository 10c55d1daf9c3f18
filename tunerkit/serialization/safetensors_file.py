"""Locate, write and read one safetensors file; equal tensors and metadata give equal bytes."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import IO

import safetensors.torch
import torch
from torch import Tensor

from tunerkit.errors import FileError, shown
from tunerkit.injection import Tuner
from tunerkit.serialization.atomic_writing import replace

KEY = "tunerkit"  # the key of tunerkit's header in the safetensors metadata
_SUFFIX = ".safetensors"
_METADATA = "__metadata__"
_BEGINNING = f'{{"{_METADATA}":'
# The dtypes of safetensors whose values fill whole bytes.
_DTYPES = {
    **{"BOOL": torch.bool, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64},
    **{"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "C64": torch.complex64},
    **{"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E8M0": torch.float8_e8m0fnu},
    **{"F8_E5M2": torch.float8_e5m2, "F8_E5M2FNUZ": torch.float8_e5m2fnuz},
}
_MOST_DIMENSIONS = 64  # torch's own limit for most operations
_LONGEST_HEADER = 100_000_000  # bytes: the limit of the safetensors library
# Exceptions of safetensors, torch and JSON. RecursionError is a RuntimeError.
_UNREADABLE = (safetensors.SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError)


def file_at(path: str | os.PathLike[str], content: str) -> Path:
    """Return ``path`` if it ends in ``.safetensors``, else ``<path>/<content>.safetensors``."""
    place = checked_path(path)
    return place if place.suffix == _SUFFIX else place / f"{content}{_SUFFIX}"


def checked_path(path: str | os.PathLike[str]) -> Path:
    """Return ``path`` as a Path. Raises `FileError` for another type, or if the path contains NUL."""
    try:
        place = Path(path)
    except TypeError:
        found = f"{type(path).__name__} {shown(path)}"
        raise FileError(f"expected the path of a folder or a file, got {found}") from None
    if "\0" in str(place):
        raise FileError(f"a path cannot contain the character NUL, got {shown(str(place))}")
    return place


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as contiguous tensors on the CPU; a tensor that already is one is not copied."""

    def is_plain(tensor: Tensor) -> bool:  # faster than a conversion, and a file may have many small tensors
        return not tensor.requires_grad and tensor.device.type == "cpu" and tensor.is_contiguous()

    return {name: each if is_plain(each) else each.detach().cpu().contiguous() for name, each in tensors.items()}


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU."""
    found: memoryview = (tensor if tensor.ndim == 1 else tensor.reshape(-1)).view(torch.uint8).numpy().data
    return found


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write contiguous CPU tensors (see `plain`) to a safetensors file, atomically."""
    if os.path.isdir(path):
        raise FileError(f"cannot write {path}: it is a folder; a path that ends in {_SUFFIX} names the file")
    # Empty tensors give the library's order and names of dtypes; with the values it would copy all bytes twice.
    entries = json.loads(safetensors.torch.save({name: each.new_empty(0) for name, each in tensors.items()})[8:])
    stored = {name: bytes_of(tensors[name]) for name in entries}
    for (name, data), end in zip(stored.items(), accumulate(map(len, stored.values())), strict=True):
        entries[name] |= {"shape": list(tensors[name].shape), "data_offsets": [end - len(data), end]}
    # Sorted, so that equal adapters give equal bytes: the library writes the metadata in random order.
    fields = {_METADATA: dict(sorted(metadata.items())), **entries}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    replace(path, (len(text).to_bytes(8, "little"), text, *stored.values()))


def read(
    path: Path, accept: Callable[[Mapping[str, str], Collection[str]], None]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a safetensors file's tensors, on the CPU, and its metadata. Raises `FileError` if it cannot be read.

    The file is opened once and read into memory, so header and data match even if the file is replaced meanwhile.
    ``accept`` gets the metadata and the tensors' names before the data is read, and may raise an error.
    """
    try:
        with open(path, "rb") as file:
            head = _header_of(file)
            names, metadata = _parsed(head[8:])
            accept(metadata, names)
            content = head + file.read()
        tensors = {}  # safetensors.torch.load does not support all dtypes that its `save` writes
        for name, entry in safetensors.deserialize(content):  # type: ignore[no-untyped-call]
            dtype, shape, data = _DTYPES[entry["dtype"]], entry["shape"], entry["data"]
            if len(shape) > _MOST_DIMENSIONS:
                raise ValueError(f"tensor {shown(name)} has more than {_MOST_DIMENSIONS} dimensions: {shown(shape)}")
            values = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            tensors[name] = values if len(shape) == 1 else values.reshape(shape)
        return tensors, metadata
    except FileError:
        raise
    except _UNREADABLE as error:
        raise FileError(f"{path} cannot be read as a safetensors file: {error}") from error


def metadata_at(path: Path) -> dict[str, str] | None:
    """Return the metadata of a safetensors file; None if there is no file, or its header cannot be read."""
    if not os.path.isfile(path):  # unlike Path.is_file, never raises
        return None
    try:
        with open(path, "rb") as file:
            text = _header_of(file)[8:].decode()
        if not text.startswith(_BEGINNING):
            return _parsed(text)[1]
        # Nearly always the metadata comes first; then the tensors' entries need not be parsed.
        metadata, _ = json.JSONDecoder().raw_decode(text, len(_BEGINNING))
        return metadata if isinstance(metadata, dict) else None
    except _UNREADABLE:
        return None


def is_ours(metadata: Mapping[str, str] | None) -> bool:
    """Whether a safetensors file with this metadata was written by tunerkit."""
    return metadata is not None and KEY in metadata and f"{KEY}.digest" in metadata


def _header_of(file: IO[bytes]) -> bytes:
    """Read the bytes before a file's data: 8 bytes with the header's length, and the header."""
    size = file.read(8)
    length = int.from_bytes(size, "little")
    if len(size) < 8 or not 2 <= length <= min(_LONGEST_HEADER, os.fstat(file.fileno()).st_size - 8):
        raise ValueError("its header is incomplete")
    return size + file.read(length)


def _parsed(text: str | bytes) -> tuple[Collection[str], dict[str, str]]:
    """Parse a header; return the tensors' names and the metadata."""
    entries = json.loads(text)
    metadata = entries.pop(_METADATA, {}) if isinstance(entries, dict) else None
    if not isinstance(metadata, dict):
        raise ValueError("its header, or the metadata in it, is not a JSON object")
    return entries.keys(), metadata


# --- Folders of a checkpoint ------------------------------------------------------------------------------------------


def folder_of(checkpoint: Path, tuners: Sequence[Tuner], tuner: Tuner) -> Path:
    """Return the folder of an adapter's files: the checkpoint itself if it has only one adapter, else a subfolder.

    The subfolder has the adapter's name; or ``name.<digest>``, if a file system might not support or distinguish the
    name. The two forms cannot collide, since no adapter's name contains a dot.
    """
    digest = hashlib.sha256(tuner.name.encode()).hexdigest()[:16]
    named = checkpoint / (tuner.name if re.fullmatch(r"[a-z0-9_-]+", tuner.name) else f"name.{digest}")
    # Earlier versions used the bare digest, unless it is the name of another adapter.
    older = checkpoint / digest
    if has_file(older, "adapter") and not has_file(named, "adapter") and digest not in {t.name for t in tuners}:
        named = older
    return named if len(tuners) > 1 or has_file(named, "adapter") else checkpoint


def has_file(folder: Path, content: str) -> bool:
    """Whether the folder contains a file of this kind, ``"adapter"`` or ``"state"``."""
    return file_at(folder, content).is_file()
