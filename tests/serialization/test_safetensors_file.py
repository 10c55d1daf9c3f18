"""The file: where it is written, whole or not at all, and damage that is refused."""

import io
import json
import multiprocessing
import os
import pickletools
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, strategies as st
from torch import nn

import tunerkit
from tunerkit.errors import FileError
from tunerkit.serialization import safetensors_file
from tunerkit.serialization.header import read

if TYPE_CHECKING:
    from tests.support.toys import Toys

from tests.support.adapter_files import assert_refused, in_place

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
@pytest.mark.parametrize("existing", [True, False])
def test_a_failing_write_leaves_what_was_there(
    toys: "Toys", saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, existing: bool
) -> None:
    """On a full disk the old file stays complete, or there is none; no temporary file is left."""

    def full(*_: object) -> None:
        raise OSError(28, "no space left on device")

    path = tmp_path / "adapter.safetensors"
    if existing:
        path.write_bytes(saved.read_bytes())
    monkeypatch.setattr(os, broken, full)
    with pytest.raises(FileError, match="no space"):
        tunerkit.save(toys.trained(targets=["conv"]), tmp_path)
    assert list(tmp_path.iterdir()) == ([path] if existing else [])
    assert not existing or path.read_bytes() == saved.read_bytes()


def test_a_file_is_replaced_in_one_move(toys: "Toys", tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A complete file, flushed to disk, is moved within its folder, so the move is atomic."""
    model, moves, synced = toys.trained(targets=["conv"]), [], []
    replace, fsync = os.replace, os.fsync

    def note(number: int) -> None:
        synced.append(number)
        fsync(number)

    def watch(source: Path, target: Path) -> None:
        assert synced
        moves.append((source.parent, source.read_bytes()))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", watch)
    path = tunerkit.save(model, tmp_path)
    assert moves == [(tmp_path, path.read_bytes())]


def test_a_private_file_stays_private(toys: "Toys", tmp_path: Path) -> None:
    """Saving over a file keeps its mode: one that only its owner may read is not opened to others."""
    path = tunerkit.save(toys.trained(targets=["conv"]), tmp_path)
    path.chmod(0o600)
    tunerkit.save(toys.trained(targets=["conv"]), tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def _killed_while_saving(model: nn.Module, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: os.kill(os.getpid(), signal.SIGKILL))
        tunerkit.save(model, folder)


def test_a_save_after_one_that_was_killed_leaves_only_the_file(toys: "Toys", saved: Path, tmp_path: Path) -> None:
    """The older file is complete in between, and then the killed writer's temporary file is gone."""
    model, path = toys.trained(targets=["conv"]), tmp_path / "adapter.safetensors"
    path.write_bytes(saved.read_bytes())
    for _ in range(3):
        writer = multiprocessing.get_context("fork").Process(target=_killed_while_saving, args=(model, tmp_path))
        writer.start()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        assert path.read_bytes() == saved.read_bytes()
    tunerkit.save(model, tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_the_folder_is_flushed_after_the_move(toys: "Toys", tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without that, a power failure may bring the older file back after `save` has returned."""
    happened: list[str] = []
    replace, fsync = os.replace, os.fsync

    def flush(number: int) -> None:
        happened.append("folder" if stat.S_ISDIR(os.fstat(number).st_mode) else "file")
        fsync(number)

    def move(source: Path, target: Path) -> None:
        happened.append("move")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", move)
    tunerkit.save(toys.trained(targets=["conv"]), tmp_path)
    assert happened == ["file", "move", "folder"]


def test_a_truncated_file_is_refused(toys: "Toys", saved: Path, tmp_path: Path) -> None:
    """Truncated at every fiftieth byte, it is rejected, and nothing is loaded."""
    data, path = saved.read_bytes(), tmp_path / "adapter.safetensors"
    for end in (*range(0, len(data), 50), len(data) - 1):
        path.write_bytes(data[:end])
        with pytest.raises(FileError):
            read(path, content="adapter")
    assert_refused(toys, path, FileError, "cannot be read as a safetensors file")


@given(data=st.data())
@in_place
def test_a_changed_byte_is_refused(toys: "Toys", saved: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Whichever byte is changed, the file is rejected with a clear error, or its content is the same."""
    whole = bytearray(saved.read_bytes())
    header_end = 8 + int.from_bytes(whole[:8], "little")
    at = data.draw(st.one_of(st.integers(0, header_end - 1), st.integers(header_end, len(whole) - 1)))
    whole[at] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(whole)
    try:
        _, tensors, found = read(path, content="adapter")
    except FileError as error:
        assert str(path) in str(error)  # noqa: PT017  # an error is one of the two right ends
        return
    _, right, expected = read(saved, content="adapter")
    assert found == expected
    assert all(torch.equal(tensors[name], tensor) for name, tensor in right.items())


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


@pytest.mark.parametrize("path", [None, 3, ["out"]])
def test_what_is_no_path_is_refused(toys: "Toys", path: Any) -> None:
    """This holds in every function that takes a path."""
    for call in (tunerkit.save, tunerkit.save_state, tunerkit.load_state):
        with pytest.raises(FileError, match=rf"expected the path .* got {type(path).__name__}"):
            call(toys.trained(), path)
    with pytest.raises(FileError, match="expected the path"):
        tunerkit.load(toys.net(), path)


def test_a_place_that_cannot_be_written_is_named(toys: "Toys", tmp_path: Path) -> None:
    """A file instead of a folder, or a folder instead of the file: our error names the path."""
    model = toys.trained(targets=["conv"])
    (tmp_path / "plain").write_text("mine")
    with pytest.raises(FileError, match="plain"):
        tunerkit.save(model, tmp_path / "plain")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(FileError, match="it is a folder"):
        tunerkit.save(model, tmp_path / "folder.safetensors")
    assert (tmp_path / "plain").read_text() == "mine"


def test_a_name_or_a_text_that_is_no_unicode_is_refused(toys: "Toys", saved: Path) -> None:
    """JSON may hold half of a surrogate pair, which no digest and no message can."""
    content = saved.read_bytes()
    length = int.from_bytes(content[:8], "little")
    fields = json.loads(content[8 : 8 + length])
    name = next(name for name in fields if name != "__metadata__")
    for changed in (
        {("\ud800" if key == name else key): value for key, value in fields.items()},
        {**fields, "__metadata__": {**fields["__metadata__"], "tunerkit.digest": "\ud800"}},
    ):
        text = json.dumps(changed).encode()
        saved.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
        with pytest.raises(FileError, match="cannot be read as a safetensors file"):
            tunerkit.load(toys.net(), saved)


# --- crafted headers ---

_LONG = "9" * 4290  # the longest number that Python's JSON takes
CRAFTED = {
    "many long dimensions": f"[{','.join([_LONG] * 400)}]",
    "many long dimensions and a 0": f"[{','.join([_LONG] * 400)},0]",
    "many dimensions": f"[{','.join(['9'] * 250_000)}]",
    "many dimensions of 1": f"[{','.join(['1'] * 250_000)}]",
    "one long dimension": f"[{_LONG}]",
    "a negative dimension": "[-1]",
    "a dimension that is no integer": "[1.0]",
    "a dimension that is true": "[true]",
}


@pytest.mark.parametrize("shape", CRAFTED)
def test_a_shape_that_no_tensor_has_is_refused_in_the_time_of_reading_it(shape: str, tmp_path: Path) -> None:
    """It takes a small multiple of the CPU time of parsing the header: its dimensions are not multiplied first."""
    text = f'{{"a":{{"dtype":"F32","shape":{CRAFTED[shape]},"data_offsets":[0,4]}}}}'
    content = text.encode() + b" " * (-len(text) % 8)
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(len(content).to_bytes(8, "little") + content + bytes(4))

    def load() -> None:
        with pytest.raises(FileError, match="cannot be read as a safetensors file"):
            safetensors_file.read(path, lambda metadata, names: None)

    plain, ours = (min(_cpu_seconds(call) for _ in range(3)) for call in (lambda: json.loads(text), load))
    assert ours < 40 * plain + 0.02


def _cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start
