"""TinyLoRA has as few numbers as it says, and loads without a decomposition."""

from pathlib import Path

import pytest
import torch
from torch import nn

import tunerkit
from tunerkit.errors import TargetError


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))


@pytest.mark.parametrize(("tying", "vectors"), [(0.0, 4), (0.5, 2), (1.0, 1)])
def test_trains_one_vector_for_each_group(tying: float, vectors: int) -> None:
    """Without tying each target has its own; with all of it, 13 numbers are all that is trained."""
    model = tunerkit.wrap(net(), "tinylora", {"targets": "all-linear", "size": 13, "tying": tying})
    assert tunerkit.trainable_parameters(model).trainable == 13 * vectors


@pytest.mark.parametrize("method", ["tinylora", "lora-xs"])
def test_a_loaded_adapter_takes_its_vectors_from_the_file(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decomposition of W takes long, so it is done in ``wrap`` alone. LoRA-XS has the same fixed vectors."""
    model = tunerkit.wrap(net(), method, {"targets": "all-linear", "rank": 3}, seed=0)
    with torch.no_grad():
        for parameter in tunerkit.tuner(model).parameters():
            parameter.add_(0.1)
    path, x = tunerkit.save(model, tmp_path), torch.randn(3, 8)
    monkeypatch.setattr(torch.linalg, "svd", None)
    assert torch.equal(tunerkit.load(net(), path)(x), model(x))


def test_a_rank_above_the_matrix_is_refused() -> None:
    """One line says what fits; the default works on any layer."""
    with pytest.raises(TargetError, match="rank is 9, and at most 8 fits"):
        tunerkit.wrap(net(), "tinylora", {"rank": 9, "targets": ["0"]})
    tunerkit.wrap(nn.Sequential(nn.Linear(8, 1)), "tinylora", {"targets": ["0"]})
