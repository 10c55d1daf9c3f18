"""One LoRA file: where it lies, its header, its tensors."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import attrs
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tunerkit.plugin import FileError

SUFFIX: Final = ".safetensors"
_METADATA: Final = "__metadata__"
_LONGEST_HEADER: Final = 100_000_000  # bytes: the limit of the safetensors library
# What it raises, what torch raises for its dtypes and shapes, and what reading JSON raises.
_UNREADABLE = (safetensors.SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError, RecursionError)


@attrs.frozen
class Header:
    """What a file says before its data.

    Attributes:
        names: The names of its tensors.
        metadata: Its metadata.
    """

    names: tuple[str, ...]
    metadata: Mapping[str, str]


def header_of(file: Path) -> Header:
    """Read a file's header and none of its tensors.

    Raises:
        FileError: It cannot be read as a safetensors file.
    """
    try:
        with open(file, "rb") as opened:
            size = opened.read(8)
            length = int.from_bytes(size, "little")
            if len(size) < 8 or not 2 <= length <= min(_LONGEST_HEADER, os.fstat(opened.fileno()).st_size - 8):
                raise ValueError("its header is incomplete")
            fields = json.loads(opened.read(length))
        if not isinstance(fields, dict):
            raise ValueError("its header is not a JSON object")
        return Header(tuple(name for name in fields if name != _METADATA), _metadata_of(fields))
    except _UNREADABLE as error:
        raise _unreadable(file, error) from error


def _metadata_of(fields: Mapping[str, Any]) -> Mapping[str, str]:
    found = fields.get(_METADATA, {})
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError("its metadata is not a mapping of texts")
    return found


def files_at(path: Path, accept: Callable[[Path, Header | None], bool]) -> list[Path]:
    """Return the files at a path, or in that folder, that a format accepts by their names and headers.

    Args:
        path: A file or a folder; or a name that is neither, which has none.
        accept: Called with each safetensors file, and its header if it can be read.
    """
    try:
        if path.is_dir():
            files = sorted(each for each in path.iterdir() if each.suffix == SUFFIX and each.is_file())
        else:
            files = [path] if path.suffix == SUFFIX and path.is_file() else []
    except (OSError, ValueError):  # no access; a name that the system does not allow
        return []
    return [file for file in files if accept(file, _header_or_none(file))]


def _header_or_none(file: Path) -> Header | None:
    try:
        return header_of(file)
    except FileError:
        return None


@attrs.frozen
class Stored:
    """How a tensor is stored: its shape, and safetensors' name of its dtype."""

    shape: tuple[int, ...]
    dtype: str


def stored_of(file: Path) -> dict[str, Stored]:
    """Return how each tensor of a file is stored, and read none of them.

    Raises:
        FileError: The file is damaged or cut off.
    """
    try:
        with safetensors.safe_open(file, framework="pt", device="cpu") as opened:
            slices = {name: opened.get_slice(name) for name in map(str, opened.keys())}
            return {name: Stored(tuple(each.get_shape()), each.get_dtype()) for name, each in slices.items()}
    except _UNREADABLE as error:
        raise _unreadable(file, error) from error


def tensors_of(file: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Read some tensors of a file, in fp32 on the CPU.

    Raises:
        FileError: They cannot be read, are no floating-point numbers, or contain NaN or inf.
    """
    try:
        with safetensors.safe_open(file, framework="pt", device="cpu") as opened:
            found = {name: opened.get_tensor(name) for name in names}
    except _UNREADABLE as error:
        raise _unreadable(file, error) from error
    return {name: _checked(tensor, name, file) for name, tensor in found.items()}


def _unreadable(file: Path, error: Exception) -> FileError:
    return FileError(f"{file} cannot be read as a safetensors file: {error}; fetch or export it again")


def _checked(tensor: Tensor, name: str, file: Path) -> Tensor:
    # Trainers write alpha as an integer too.
    if not (tensor.is_floating_point() or (tensor.numel() == 1 and not tensor.is_complex())):
        raise FileError(f"{file}: {name!r} holds {tensor.dtype}, expected floating-point numbers")
    tensor = tensor.to(torch.float32)
    if not tensor.isfinite().all():
        raise FileError(f"{file}: {name!r} contains NaN or inf; use a file that was saved before the training diverged")
    return tensor


def write_file(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file. Each tensor gets its own storage: adapters may share one, which safetensors rejects."""
    apart = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    file.write_bytes(safetensors.torch.save(apart, dict(metadata)))
