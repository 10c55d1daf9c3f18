"""The header of a GGUF file: its metadata, and the names, shapes and types of its tensors."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import attrs

from tunerkit.plugin import FileError

MAGIC: Final = b"GGUF"
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING: Final = 8
_ARRAY: Final = 9
_LARGEST: Final = 1 << 26  # bytes of one text; a vocabulary's arrays are skipped text by text
_MOST: Final = 1 << 20  # tensors, or entries of the metadata: the largest models have some thousands
TYPES: Final = {0: "F32", 1: "F16", 8: "Q8_0", 30: "BF16"}


@attrs.frozen
class GgufAdapter:
    """A GGUF file.

    Attributes:
        path: Where it is.
        metadata: Its keys and values; an array's value is its length.
        tensors: The shape and type of each tensor by its name. The shape is GGUF's, the fastest dimension first.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, tuple[tuple[int, ...], str]]

    @property
    def architecture(self) -> str:
        """The architecture that the base must have."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def alpha(self) -> float:
        """The numerator of the scale; 0 if there is none."""
        value = self.metadata.get("adapter.lora.alpha", 0.0)
        return float(value) if isinstance(value, int | float) else 0.0

    @property
    def halves(self) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        """The shapes of ``lora_a`` and ``lora_b`` by the name of the base's tensor."""
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, (shape, _) in self.tensors.items():
            base, _, half = name.rpartition(".")
            if half in ("lora_a", "lora_b"):
                found.setdefault(base, {})[half] = shape
        return found

    @property
    def ranks(self) -> Mapping[str, int]:
        """The rank of each tensor of the base: the fastest dimension of ``lora_b``."""
        return {base: halves["lora_b"][0] for base, halves in self.halves.items() if halves.get("lora_b")}

    @property
    def summary(self) -> str:
        """What it is, in a few words."""
        ranks = sorted(set(self.ranks.values()))
        said = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "no tensors"
        return f"GGUF adapter for {self.architecture}, {len(self.ranks)} tensors, {said}, alpha {self.alpha:g}"


def is_gguf(path: Path) -> bool:
    """Check whether a file begins as GGUF files do."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def read_gguf(path: Path) -> GgufAdapter:
    """Read the header of a GGUF file, version 2 or 3, little-endian.

    Args:
        path: The file.

    Returns:
        Its metadata and tensors.

    Raises:
        FileError: It is cut off or damaged, or has another version.
    """
    try:
        with path.open("rb") as file:
            return _read(path, file)
    except (OSError, struct.error, ValueError, UnicodeDecodeError) as problem:
        raise FileError(f"{path}: its GGUF header cannot be read: {problem}; write the file again") from problem


def _read(path: Path, file: BinaryIO) -> GgufAdapter:
    if file.read(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = _scalar(file, "I")
    if version not in (2, 3):
        raise ValueError(f"expected version 2 or 3, got {version}")
    tensors, entries = _count(file), _count(file)
    metadata = {_text(file): _value(file, _scalar(file, "I")) for _ in range(entries)}
    return GgufAdapter(path, metadata, dict(_tensor(file) for _ in range(tensors)))


def _tensor(file: BinaryIO) -> tuple[str, tuple[tuple[int, ...], str]]:
    name, dimensions = _text(file), _scalar(file, "I")
    if dimensions > 8:
        raise ValueError(f"{name[:80]!r} has {dimensions} dimensions")
    shape = tuple(_scalar(file, "Q") for _ in range(dimensions))
    kind = _scalar(file, "I")
    _scalar(file, "Q")  # the offset
    return name, (shape, TYPES.get(kind, f"type {kind}"))


def _value(file: BinaryIO, kind: int) -> Any:
    if kind in _SCALARS:
        return _scalar(file, _SCALARS[kind])
    if kind == _STRING:
        return _text(file)
    if kind != _ARRAY:
        raise ValueError(f"there is no type {kind}")
    inner, length = _scalar(file, "I"), _scalar(file, "Q")
    if inner == _ARRAY:
        raise ValueError("arrays of arrays are not used")
    if inner == _STRING:
        for _ in range(min(length, _LARGEST)):
            _text(file)
    else:
        file.seek(length * struct.calcsize(_SCALARS.get(inner, "Q")), 1)
    return length


def _scalar(file: BinaryIO, code: str) -> Any:
    return struct.unpack("<" + code, file.read(struct.calcsize("<" + code)))[0]


def _count(file: BinaryIO) -> int:
    number = int(_scalar(file, "Q"))
    if number > _MOST:
        raise ValueError(f"{number} entries are too many")
    return number


def _text(file: BinaryIO) -> str:
    length = int(_scalar(file, "Q"))
    if length > _LARGEST:
        raise ValueError(f"a text of {length} bytes is too long")
    data = file.read(length)
    if len(data) < length:
        raise ValueError("the file is cut off")
    return data.decode("utf-8")
