"""PEFT folders written by hand, for tests of the files themselves, and a small model for them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tunerkit

PREFIX = "base_model.model."


class Block(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(4, 4)
        self.value = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.tanh(self.value(torch.tanh(self.query(x))))
        return result


class Net(nn.Module):
    """Ids (N, L) to (N, L, 3): an embedding with a padding row, two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(10, 4, padding_idx=0)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed_tokens(ids)
        for layer in self.layers:
            h = layer(h)
        result: Tensor = self.head(h)
        return result


IDS = torch.tensor([[1, 2, 3, 0], [4, 9, 6, 5]])


def net() -> Net:
    """The same model each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


def tensors(paths: tuple[str, ...] = ("layers.0.query", "layers.1.query"), rank: int = 2) -> dict[str, Tensor]:
    """A LoRA of linear layers of 4 features, with random values."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for path in paths:
        found[f"{PREFIX}{path}.lora_A.weight"] = torch.randn(rank, 4, generator=generator)
        found[f"{PREFIX}{path}.lora_B.weight"] = torch.randn(4, rank, generator=generator)
    return found


CONFIG: Mapping[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query"]}


def folder(path: Path, config: Mapping[str, Any] | None = None, weights: Mapping[str, Tensor] | None = None) -> Path:
    """Write a folder, with `CONFIG` changed by ``config``, and with ``weights`` or `tensors`."""
    path.mkdir(exist_ok=True, parents=True)
    (path / "adapter_config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    save_file(dict(tensors() if weights is None else weights), path / "adapter_model.safetensors")
    return path


def held(path: Path) -> dict[str, Tensor]:
    """The tensors of a folder, without PEFT's prefix."""
    found: dict[str, Tensor] = load_file(path / "adapter_model.safetensors")
    return {name.removeprefix(PREFIX): tensor for name, tensor in found.items()}


def settings(path: Path) -> dict[str, Any]:
    """The settings of a folder."""
    found: dict[str, Any] = json.loads((path / "adapter_config.json").read_text())
    return found


def refused(path: Path, *parts: str, model: nn.Module | None = None) -> str:
    """Load, expect one `FileError` with these parts, and a model without a trace of it."""
    model = net() if model is None else model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(tunerkit.errors.FileError) as caught:
        tunerkit.load(model, path)
    text = str(caught.value)
    for part in parts:
        assert part in text
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return text
