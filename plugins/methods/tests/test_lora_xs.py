"""LoRA-XS takes its fixed vectors from W, and when it is loaded from the file."""

from pathlib import Path

import pytest
import torch
from torch import nn

import tunerkit


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8))


def test_a_loaded_adapter_takes_its_vectors_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decomposition of W takes long, so it is done in ``wrap`` alone."""
    model = tunerkit.wrap(net(), "lora-xs", {"targets": "all-linear", "rank": 3})
    with torch.no_grad():
        for parameter in tunerkit.tuner(model).parameters():
            parameter.add_(0.1)
    path, x = tunerkit.save(model, tmp_path), torch.randn(3, 8)
    monkeypatch.setattr(torch.linalg, "svd", None)
    assert torch.equal(tunerkit.load(net(), path)(x), model(x))
