"""The GGUF container: metadata and tensors of a file, each length checked against the file's size.

gguf's own reader maps arrays past the end of a damaged file, and does not return from some of them.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
import numpy as np
import torch
from torch import Tensor

from tunerkit.plugin import FileError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_STRING: Final = 8
_ARRAY: Final = 9
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MOST_DIMENSIONS: Final = 4


@attrs.frozen
class Stored:
    """Where a tensor is stored: its shape in torch's order, ggml's type, and its first byte after the metadata."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@attrs.frozen(eq=False)
class Container:
    """An open file.

    Attributes:
        path: The file.
        values: The metadata by key. Instead of an array there is its length.
        tensors: The tensors by name.
    """

    path: Path
    values: Mapping[str, object]
    tensors: Mapping[str, Stored]
    _start: int
    _bytes: mmap.mmap

    def tensor(self, name: str) -> Tensor:
        """Return a copy of a tensor in fp32. Raises `FileError` if it is cut off or of an unknown type."""
        from gguf.quants import dequantize

        kind, start, count = self._place(name)
        shape = self.tensors[name].shape
        raw = np.frombuffer(self._bytes[start : start + count], np.uint8).reshape(*shape[:-1], -1)
        try:
            return torch.from_numpy(np.array(dequantize(raw, kind), dtype=np.float32).reshape(shape))
        except NotImplementedError:
            raise FileError(f"{self.path}: {name} is of type {kind.name}; write it as f32 or f16") from None

    def dtype(self, name: str) -> str:
        """Return how a tensor's numbers are stored, such as ``"f16"``; none is read. Raises as `tensor` does."""
        kind, _, _ = self._place(name)
        return kind.name.lower()

    def _place(self, name: str) -> tuple["GGMLQuantizationType", int, int]:
        """The type of a tensor, its first byte in the file, and the number of its bytes."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        stored = self.tensors[name]
        try:
            kind = GGMLQuantizationType(stored.kind)
            block, size = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise FileError(f"{self.path}: {name} is of ggml's type {stored.kind}, which is not known") from None
        row, rows = stored.shape[-1], math.prod(stored.shape[:-1])
        if row % block:
            raise FileError(f"{self.path}: {name} has rows of {row} numbers, in blocks of {block}; it is damaged")
        start, count = self._start + stored.offset, rows * (row // block) * size
        if start + count > len(self._bytes):
            raise FileError(f"{self.path}: {name} ends after the file's {len(self._bytes)} bytes; copy the file again")
        return kind, start, count


def open_container(path: Path) -> Container:
    """Read the metadata of a file. Raises `FileError` if it cannot be opened, is cut off, or is no GGUF file."""
    try:
        with path.open("rb") as stream:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: the file is empty
        raise FileError(f"{path} cannot be read: {error}") from error
    cursor = _Cursor(path, data)
    if cursor.take(4) != MAGIC:
        raise FileError(f"{path} is no GGUF file: it does not begin with GGUF")
    if (version := cursor.number("I")) not in _VERSIONS:
        raise FileError(
            f"{path} has GGUF version {version}; known: {_VERSIONS}. Files of big-endian machines are not read"
        )
    count, entries = cursor.number("Q"), cursor.number("Q")
    values: dict[str, object] = {}
    for _ in range(entries):
        key = cursor.text()
        values[key] = cursor.value(cursor.number("I"))
    tensors: dict[str, Stored] = {}
    for _ in range(count):
        name = cursor.text()
        if name in tensors:
            raise FileError(f"{path} has the tensor {name} twice")
        tensors[name] = cursor.stored(name)
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise FileError(f"{path}: general.alignment is {alignment!r}; it must be a positive whole number")
    return Container(path, values, tensors, -(-cursor.at // alignment) * alignment, data)


@attrs.define
class _Cursor:
    """Where reading has come to."""

    path: Path
    data: mmap.mmap
    at: int = 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise FileError(f"{self.path} ends within its metadata, after {len(self.data)} bytes; copy the file again")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, kind: str) -> Any:
        return struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> object:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._skipped(self.number("I"), self.number("Q"))
        return self.number(self._scalar(kind))

    def _skipped(self, kind: int, count: int) -> int:
        """Pass over an array, of which no adapter's reader needs more than that it is there."""
        if kind == _STRING:
            for _ in range(count):
                self.take(self.number("Q"))
        else:
            self.take(struct.calcsize(self._scalar(kind)) * count)
        return count

    def _scalar(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise FileError(
                f"{self.path} has a value of type {kind} at byte {self.at}, which is not known; it is damaged"
            )
        return _SCALARS[kind]

    def stored(self, name: str) -> Stored:
        dimensions = self.number("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise FileError(f"{self.path}: {name} has {dimensions} dimensions; it is damaged")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        if 0 in shape:
            raise FileError(f"{self.path}: {name} has shape {shape[::-1]}, so it holds nothing; it is damaged")
        return Stored(shape=shape[::-1], kind=self.number("I"), offset=self.number("Q"))
