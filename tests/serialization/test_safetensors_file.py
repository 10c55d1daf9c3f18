"""The file: where it is written, whole or not at all, and damage that is refused."""

import contextlib
import io
import json
import os
import pickletools
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

import tunerkit
from tests.support.adapter_files import assert_refused
from tests.support.toys import Toys
from tunerkit.errors import FileError
from tunerkit.serialization.header import read

pytestmark = pytest.mark.filterwarnings("ignore:.*running statistics")


def test_a_folder_gets_the_file_and_a_path_is_the_file(toys: "Toys", tmp_path: Path) -> None:
    """Folders are created; the suffix decides between file and folder; str and Path work."""
    model = toys.trained(targets=["conv"])
    assert tunerkit.save(model, tmp_path / "new" / "folder") == tmp_path / "new" / "folder" / "adapter.safetensors"
    assert tunerkit.save(model, str(tmp_path / "a.safetensors")) == tmp_path / "a.safetensors"
    assert tunerkit.save(model, tmp_path / "v1.5") == tmp_path / "v1.5" / "adapter.safetensors"
    for path in (tmp_path / "new" / "folder", str(tmp_path / "a.safetensors"), tmp_path / "v1.5"):
        assert torch.equal(tunerkit.load(toys.net(), path)(toys.x()), model(toys.x()))


def test_equal_adapters_give_equal_bytes(toys: "Toys", saved: Path, tmp_path: Path) -> None:
    """Files can be compared by digest: saving again changes no byte."""
    assert {tunerkit.save(toys.trained(), tmp_path).read_bytes() for _ in range(6)} == {saved.read_bytes()}


def test_tensors_lie_at_multiples_of_eight_bytes(saved: Path) -> None:
    """Readers map the file into memory, so data must be aligned."""
    assert int.from_bytes(saved.read_bytes()[:8], "little") % 8 == 0


def test_the_file_holds_no_pickle(saved: Path) -> None:
    """It is safetensors, which other programs can read, and contains no executable code."""
    assert safetensors.torch.load_file(saved)
    with pytest.raises(ValueError):
        pickletools.dis(saved.read_bytes(), out=io.StringIO())


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_files_mode_follows_the_umask(toys: "Toys", tmp_path: Path, umask: int) -> None:
    """Others can read it like any other file of the user."""
    before = os.umask(umask)
    try:
        path = tunerkit.save(toys.trained(targets=["conv"]), tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failing_write_leaves_nothing_where_nothing_was(
    toys: "Toys", tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """On a full disk there is no file, and no temporary one; an older file is tested in tests/faults."""

    def full(*_: object) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(os, broken, full)
    with pytest.raises(FileError, match="no space"):
        tunerkit.save(toys.trained(targets=["conv"]), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_programs_file_is_refused(toys: "Toys", tmp_path: Path) -> None:
    """A safetensors file without our header, another file type, or a missing file: each has its own error."""
    path = tmp_path / "adapter.safetensors"
    assert_refused(toys, tmp_path, FileError, "there is no file .*adapter.safetensors")
    safetensors.torch.save_file({"a": torch.ones(1)}, path)
    assert_refused(toys, path, FileError, "no tunerkit header")
    safetensors.torch.save_file({"a": torch.ones(1)}, path, {"format": "pt"})
    assert_refused(toys, path, FileError, "no tunerkit header")
    torch.save({"a": torch.ones(1)}, path)
    assert_refused(toys, path, FileError, "cannot be read as a safetensors file")
    path.unlink()
    path.mkdir()
    assert_refused(toys, path, FileError, "there is no file")


def test_a_folder_in_the_place_of_the_file_is_named(toys: "Toys", tmp_path: Path) -> None:
    """Our error names the path. A file in the place of a folder is tested in test_atomic_writing.py."""
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(FileError, match=r"folder\.safetensors: it is a folder"):
        tunerkit.save(toys.trained(targets=["conv"]), tmp_path / "folder.safetensors")


# --- crafted headers ---


def tensor(shape: object = "[1]", place: str = "[0,4]", dtype: str = "F32", name: str = "a") -> str:
    return f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{place}}}'


def one(*shape: object, **others: str) -> str:
    return "{" + tensor(f"[{','.join(map(str, shape))}]", **others) + "}"


def two(place: str, other: str) -> str:
    return "{" + tensor(place=place) + "," + tensor(place=other, name="b") + "}"


_LONG = "9" * 4290  # the longest number that Python's JSON takes
# Texts of headers, and how many bytes come behind each.
CRAFTED: dict[str, tuple[str, int]] = {
    "nested": ("[" * 100_000, 4),
    "metadata that are a list": ('{"__metadata__":[]}', 4),
    "metadata that are no text": ('{"__metadata__":{"tunerkit":3}}', 4),
    "a text": ('"text"', 4),
    "no text": ("\udcff\udcfe{}", 4),  # its bytes are no UTF-8
    "half of a surrogate pair as a name": (one(1, name=r"\ud800"), 4),
    "half of a surrogate pair as a digest": (r'{"__metadata__":{"tunerkit":"{}","tunerkit.digest":"\ud800"}}', 0),
    "another dtype": (one(1, dtype="X9"), 4),
    "more than there is": (one(10**14), 4),
    "many long dimensions": (one(*[_LONG] * 400), 4),
    "many long dimensions and a 0": (one(*[_LONG] * 400, 0), 4),
    "many dimensions": (one(*[9] * 250_000), 4),
    "many dimensions of 1": (one(*[1] * 250_000), 4),
    "one long dimension": (one(_LONG), 4),
    "a negative dimension": (one(-1), 4),
    "a dimension that is no integer": (one(1.0), 4),
    "a dimension that is true": (one("true"), 4),
    "a gap": (two("[0,4]", "[8,12]"), 8),
    "one over the other": (two("[0,4]", "[0,4]"), 8),
    "another size": (two("[0,8]", "[8,12]"), 8),
    "behind the end": (two("[0,4]", "[4,12]"), 8),
    "too few": (one(1), 8),
    "before the start": (two("[-4,0]", "[0,4]"), 8),
    "text as a place": (two("[0,4]", '["4","8"]'), 8),
    "one number as a place": (two("[0,4]", "[4]"), 8),
    # The library reads these two, as it has 64-bit sizes without a sign.
    "no values, and more than torch can count": (one(0, 2**63, place="[0,0]"), 0),
    "no values, and the most of 64 bits": (one(0, 2**64 - 1, place="[0,0]"), 0),
}


@pytest.mark.parametrize("case", CRAFTED)
def test_a_header_that_no_writer_means_is_refused_in_the_time_of_reading_it(case: str, tmp_path: Path) -> None:
    """It takes a small multiple of the CPU time of parsing the header: dimensions are not multiplied first."""
    text, behind = CRAFTED[case]
    content = text.encode(errors="surrogateescape")
    content += b" " * (-len(content) % 8)
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(len(content).to_bytes(8, "little") + content + bytes(behind))

    def load() -> None:
        with pytest.raises(FileError, match=r"cannot be read as a safetensors file|no tunerkit header"):
            read(path, content="adapter")

    def parse() -> None:
        with contextlib.suppress(ValueError, RecursionError):
            json.loads(text)

    plain, ours = (min(_cpu_seconds(call) for _ in range(3)) for call in (parse, load))
    assert ours < 40 * plain + 0.02


def _cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start
