"""Reading a file: all of one file, opened once, and what is not ours is named."""

import builtins
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import tunerkit
from tests.support.toys import Toys
from tunerkit import hooks
from tunerkit.errors import FileError
from tunerkit.serialization.header import read


def watched(monkeypatch: pytest.MonkeyPatch, path: Path, act: Callable[[], object]) -> list[str]:
    """Call ``act`` when ``path`` has been opened; what was opened is listed, however it was."""
    opened: list[str] = []
    plain, low = builtins.open, os.open

    def note(name: Any, opener: Any, *args: Any, **kwargs: Any) -> Any:
        file = opener(name, *args, **kwargs)
        if str(name) == str(path):
            opened.append(str(name))
            if len(opened) == 1:
                act()
        return file

    monkeypatch.setattr(builtins, "open", lambda name, *args, **kwargs: note(name, plain, *args, **kwargs))
    monkeypatch.setattr(os, "open", lambda name, *args, **kwargs: note(name, low, *args, **kwargs))
    return opened


def test_a_file_that_is_replaced_while_it_is_read_is_read_whole(
    toys: "Toys", saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Header and tensors are of one file: the file is opened once, and a new one under its name is not looked at."""
    path, other = tmp_path / "adapter.safetensors", tmp_path / "other.safetensors"
    path.write_bytes(saved.read_bytes())
    tunerkit.save(toys.fill_(toys.trained(targets=["conv"]), seed=11), other)
    opened = watched(monkeypatch, path, lambda: os.replace(other, path))
    _, tensors, header = read(path, content="adapter")
    assert opened == [str(path)]
    _, expected, _ = read(saved, content="adapter")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    assert header.targets == ("conv", "layers.0", "layers.1")


def test_tensors_do_not_change_with_the_file(saved: Path, tmp_path: Path) -> None:
    """What was checked is what is used, whatever happens to the file later: it may be cut, or written over in place."""
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(saved.read_bytes())
    _, tensors, _ = read(path, content="adapter")
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with open(path, "r+b") as file:
        file.seek(0, os.SEEK_END)
        end = file.tell()
        file.seek(0)
        file.write(b"\0" * end)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())
    os.truncate(path, 10)  # with the file mapped into memory, reading the tensors would now kill the process
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())


def test_a_file_that_is_cut_while_it_is_read_is_refused(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an incomplete file like any other."""
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(saved.read_bytes())
    watched(monkeypatch, path, lambda: os.truncate(path, saved.stat().st_size - 8))
    with pytest.raises(FileError, match="cannot be read as a safetensors file"):
        read(path, content="adapter")


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_a_header_of_any_claimed_length_is_refused(tmp_path: Path, length: int) -> None:
    """The length in the first eight bytes is compared with the file's size before that much is read."""
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(FileError, match="cannot be read as a safetensors file"):
        read(path, content="adapter")


def peft_folder(folder: Path, *, weights: str = "adapter_model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    tensors = {"base_model.model.layers.0.q_proj.lora_A.weight": torch.ones(8, 4)}
    if weights.endswith(".bin"):
        torch.save(tensors, folder / weights)
    else:
        safetensors.torch.save_file(tensors, folder / weights, {"format": "pt"})
    return folder


@pytest.mark.parametrize("content", ["adapter", "state"])
@pytest.mark.parametrize("case", ["folder", "older folder", "file", "renamed file", "file without its folder"])
def test_a_peft_adapter_is_named_with_what_reads_it(
    tmp_path: Path, case: str, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says that it is PEFT's, which distribution reads it, and how to load it without that."""
    monkeypatch.setattr(hooks, "gather_formats", dict)  # none is installed
    older = "adapter_model.bin" if case == "older folder" else "adapter_model.safetensors"
    folder = peft_folder(tmp_path / "peft", weights=older)
    file = folder / "adapter_model.safetensors"
    if case == "renamed file":
        file = file.rename(tmp_path / "mine.safetensors")
    elif case == "file without its folder":
        file = file.rename(tmp_path / "adapter_model.safetensors")
    with pytest.raises(FileError, match=r"PEFT.*pip install .*\[peft\].*PeftModel\.from_pretrained"):
        read(folder if case in ("folder", "older folder") else file, content=content)


def test_our_file_in_a_peft_folder_is_loaded(toys: "Toys", saved: Path, tmp_path: Path) -> None:
    """Only a folder without our file is taken for another library's."""
    folder = peft_folder(tmp_path / "both")
    (folder / "adapter.safetensors").write_bytes(saved.read_bytes())
    assert torch.equal(tunerkit.load(toys.net(), folder)(toys.x()), toys.trained()(toys.x()))


def test_the_data_of_another_program_s_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole model's file may have any size: its header is enough to refuse it."""
    path = tmp_path / "adapter.safetensors"
    safetensors.torch.save_file({"a": torch.ones(1_000_000)}, path, {"format": "pt"})
    amounts: list[int] = []
    plain = builtins.open

    class Counting(io.FileIO):
        def read(self, size: int | None = -1, /) -> bytes:
            found = super().read(-1 if size is None else size)
            amounts.append(len(found))
            return found

    def count(name: Any, *args: Any, **kwargs: Any) -> Any:
        return Counting(name) if str(name) == str(path) else plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", count)
    with pytest.raises(FileError, match="no tunerkit header"):
        read(path, content="adapter")
    assert 0 < sum(amounts) < 1000


@pytest.mark.parametrize(
    "name", ["a\0b", "x" * 300, "y" * 300 + ".safetensors", "z/" * 3000, "\ud800", None, 3, ["out"]]
)
def test_a_path_that_no_file_can_have_is_refused(toys: "Toys", tmp_path: Path, name: Any) -> None:
    """NUL, too long, not encodable, or no path: the error is ours and short, in every function that takes a path."""
    model, load = toys.trained(targets=["conv"]), lambda _, path: tunerkit.load(toys.net(), path)
    is_text = isinstance(name, str)
    for path in (f"{tmp_path}/{name}", tmp_path / name) if is_text else (name,):
        for call in (tunerkit.save, tunerkit.save_state, tunerkit.load_state, load):
            with pytest.raises(FileError, match="" if is_text else "expected the path .* got") as caught:
                call(model, path)
            assert len(str(caught.value)) < 2000
    assert list(tmp_path.iterdir()) == []
