"""Where an adapter is: folders, files, and names on the hub."""

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

import tunerkit
from plugins.peft.tests import peft_folders
from plugins.peft.tests.peft_folders import refused
from tests.support.pipes import pipe
from tunerkit_peft.folders import sniff


def test_a_folder_without_one_of_the_files_is_refused(tmp_path: Path) -> None:
    """The missing file is named, and adapters one folder deeper are offered."""
    peft_folders.folder(tmp_path / "only-settings")
    (tmp_path / "only-settings" / "adapter_model.safetensors").unlink()
    refused(tmp_path / "only-settings", "no adapter_model.safetensors")
    peft_folders.folder(tmp_path / "only-tensors" / "deeper")
    (tmp_path / "only-tensors" / "deeper" / "adapter_model.safetensors").rename(
        tmp_path / "only-tensors" / "adapter_model.safetensors"
    )
    refused(tmp_path / "only-tensors", "no adapter_config.json", "deeper")


def test_pickles_are_never_read(tmp_path: Path) -> None:
    """A folder with a pickle alone is refused with the way to convert it; beside safetensors it is ignored."""
    peft_folders.folder(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"no pickle")
    tunerkit.load(peft_folders.net(), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    refused(tmp_path, "pickle", "save_pretrained")


def test_a_folder_around_adapters_is_no_adapter(tmp_path: Path) -> None:
    """PEFT saves adapters with a name one folder deeper; the error names these folders."""
    peft_folders.folder(tmp_path / "news")
    (tmp_path / "README.md").write_text("# Adapters")
    refused(tmp_path, "no adapter_config.json", str(tmp_path / "news"), "pass one of these")


def test_a_pipe_for_its_settings_makes_no_adapter_of_a_folder(tmp_path: Path) -> None:
    """To open it would wait for who writes into it."""
    with pipe(tmp_path / "adapter_config.json"), mock.patch.object(Path, "open", side_effect=AssertionError):
        assert not sniff(tmp_path)


def test_a_pointer_is_named_as_such(tmp_path: Path) -> None:
    """A repository that was cloned without git-lfs has pointers in place of its large files."""
    file = peft_folders.folder(tmp_path) / "adapter_model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n")
    refused(tmp_path, "adapter_model.safetensors", "git lfs pull")


def test_settings_may_begin_with_a_mark_of_their_encoding(tmp_path: Path) -> None:
    """Editors on Windows put it there; other programs add settings that change nothing."""
    plain = tunerkit.load(peft_folders.net(), peft_folders.folder(tmp_path / "plain"))
    marked = peft_folders.folder(tmp_path / "marked", {"unsloth_fixed": True})
    file = marked / "adapter_config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    model = tunerkit.load(peft_folders.net(), marked)
    assert torch.equal(model(peft_folders.IDS), plain(peft_folders.IDS))


class Hub:
    """A hub that answers from a folder; without a connection, an earlier download may still be there."""

    def __init__(self, folder: Path, *, reached: bool, cached: bool = False) -> None:
        self.folder, self.reached, self.cached = folder, reached, cached
        self.asked: list[tuple[str, str]] = []

    def model_info(self, name: str, timeout: float) -> None:
        if not self.reached:
            raise ConnectionError("no route\nto the host")

    def download(self, name: str, file: str, *, local_files_only: bool) -> str:
        self.asked.append((name, file))
        assert local_files_only is not self.reached
        if not (self.folder / file).is_file() or not (self.reached or self.cached):
            raise FileNotFoundError(f"no {file} in the repository")
        return str(self.folder / file)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Hub]:
    """Put a hub in place of the real one."""
    import huggingface_hub

    def placed(**state: bool) -> Hub:
        found = Hub(tmp_path / "cache", **state)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", found.download)
        return found

    return placed


def test_a_name_on_the_hub_that_cannot_be_reached_is_refused(hub: Callable[..., Hub]) -> None:
    """The error says that there is no such folder, and why the hub gives nothing: it is asked once."""
    hub(reached=False)
    refused(Path("org/adapter"), "no folder 'org/adapter'", "Hugging Face hub", "no route")
    hub(reached=True)
    refused(Path("org/adapter"), "no folder 'org/adapter'", "no adapter_config.json in the repository")


@pytest.mark.parametrize("reached", [True, False])
def test_an_adapter_on_the_hub_is_read(hub: Callable[..., Hub], tmp_path: Path, reached: bool) -> None:
    """Only the two files are downloaded, and read as from a folder; without a connection from the cache."""
    peft_folders.folder(tmp_path / "cache")
    placed = hub(reached=reached, cached=True)
    model = tunerkit.load(peft_folders.net(), "org/adapter")
    assert placed.asked == [("org/adapter", "adapter_config.json"), ("org/adapter", "adapter_model.safetensors")]
    assert tunerkit.tuner(model).ranks() == {"layers.0.query": 2, "layers.1.query": 2}
