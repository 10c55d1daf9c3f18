"""The container: every length in a file is checked against its size."""

import struct
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

import tunerkit
from plugins.gguf.tests.test_reading import A, file_of
from tunerkit_gguf.container import open_container

HUGE = 1 << 60


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(*, tensors: int = 0, entries: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, entries)


WRONG = {
    "empty": (b"", "cannot be read"),
    "magic": (header(magic=b"GGML"), "does not begin with GGUF"),
    "version": (header(version=1), "version 1"),
    "big-endian": (header(version=3 << 24), "big-endian"),
    "entries": (header(entries=HUGE), "ends within its metadata"),
    "tensors": (header(tensors=HUGE), "ends within its metadata"),
    "long key": (header(entries=1) + struct.pack("<Q", HUGE), "ends within its metadata"),
    "type": (header(entries=1) + text("a") + struct.pack("<I", 77), "value of type 77"),
    # gguf's own reader does not return from these two.
    "long array": (header(entries=1) + text("a") + struct.pack("<IIQ", 9, 0, HUGE), "ends within its metadata"),
    "long strings": (header(entries=1) + text("a") + struct.pack("<IIQ", 9, 8, HUGE), "ends within its metadata"),
    "nested array": (header(entries=1) + text("a") + struct.pack("<IIQ", 9, 9, 1), "value of type 9"),
    "dimensions": (header(tensors=1) + text("t") + struct.pack("<I", 1 << 30), "dimensions"),
    "nothing in it": (header(tensors=1) + text("t") + struct.pack("<IQQIQ", 2, 0, 4, 0, 0), r"shape \(4, 0\)"),
    "alignment": (header(entries=1) + text("general.alignment") + struct.pack("<II", 4, 0), "general.alignment is 0"),
    "twice": (header(tensors=2) + 2 * (text("t") + struct.pack("<IQIQ", 1, 4, 0, 0)), "twice"),
}


@pytest.mark.parametrize(("content", "said"), WRONG.values(), ids=WRONG)
def test_a_damaged_container_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    """At once, with the file and what is wrong."""
    file = tmp_path / "a.gguf"
    file.write_bytes(content)
    with pytest.raises(tunerkit.errors.FileError, match=f"(?s)a.gguf.*{said}"):
        open_container(file)


@pytest.mark.parametrize(
    ("shape", "kind", "offset", "said"),
    [
        ((4,), 0, HUGE, "ends after"),
        ((HUGE, HUGE, HUGE), 0, 0, "ends after"),
        ((4,), 99, 0, "type 99"),
        ((5,), 8, 0, "blocks of 32"),
    ],
)
def test_a_damaged_tensor_is_refused(shape: tuple[int, ...], kind: int, offset: int, said: str, tmp_path: Path) -> None:
    """When it is asked for; no memory is taken for what the file cannot hold."""
    file = tmp_path / "a.gguf"
    described = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    file.write_bytes(header(tensors=1) + text("t") + described + bytes(64))
    with pytest.raises(tunerkit.errors.FileError, match=f"a.gguf: t .*{said}"):
        open_container(file).tensor("t")


@given(place=st.integers(0, 400), value=st.integers(0, 255))
def test_a_changed_byte_gives_tensors_or_one_error(
    place: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Nothing else is raised, and a tensor that is read has the shape that was announced."""
    file = tmp_path_factory.getbasetemp() / "changed.gguf"
    content = bytearray(file_of(file).read_bytes())
    content[place] = value
    file.write_bytes(content)
    with suppress(tunerkit.errors.FileError):
        container = open_container(file)
        for name, described in container.tensors.items():
            assert tuple(container.tensor(name).shape) == tuple(described.shape)


def test_tensors_and_values_are_read(tmp_path: Path) -> None:
    """Shapes are in torch's order; of an array there is the length; a tensor outlives the file."""
    file = file_of(tmp_path / "a.gguf", {"a": "text", "b": 1.5, "c": ["x", "y"], "d": [1, 2, 3], "e": 7}, {"t": 2 * A})
    container = open_container(file)
    assert [container.values[name] for name in "abcde"] == ["text", 1.5, 2, 3, 7]
    tensor = container.tensor("t")
    file.unlink()
    assert torch.equal(tensor, torch.full((2, 32), 2.0))
