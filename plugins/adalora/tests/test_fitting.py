"""AdaLoRA's starts by data: Q has the main directions, ΔW is 0, and training prunes as ever."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import tunerkit
from tunerkit.errors import ConfigError, StepError
from tunerkit_adalora.config import AdaLoraConfig
from tunerkit_adalora.fitting import unit_rows
from tunerkit_adalora.svd_layer import SvdLayer

X = torch.randn(60, 12, generator=torch.Generator().manual_seed(1)) * 0.8 ** torch.arange(12) + 0.5
STARTS: tuple[Literal["eva", "gradients"], ...] = ("eva", "gradients")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 4)).requires_grad_(False)


def loss_of(output: Tensor, batch: Any) -> Tensor:
    return output.square().mean()


def wrapped(start: str, **settings: Any) -> nn.Sequential:
    config = {"start": start, "init_rank": 4, "target_rank": 2, "targets": ["0", "2"], **settings}
    return tunerkit.wrap(network(), "adalora", config, seed=0)


def train(model: nn.Module, steps: int = 20) -> nn.Module:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tunerkit.attach(model, optimizer, total_steps=steps)
    for _ in range(steps):
        loss_of(model(X), None).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize(("rank", "directions"), [(4, 64), (50, 200)])
def test_a_start_asks_for_more_directions_than_it_has_triplets(rank: int, directions: int) -> None:
    """Four per triplet and at least 64 of the inputs, or half as many of the gradient: the last ones are inexact."""
    inputs, gradients = (AdaLoraConfig(init_rank=rank, target_rank=rank, start=start).request() for start in STARTS)
    assert inputs is not None
    assert gradients is not None
    assert (inputs.inputs, gradients.gradients) == (directions, directions // 2)


@pytest.mark.parametrize("start", STARTS)
def test_q_starts_at_what_the_data_say(start: str) -> None:
    """Law: the rows of Q are principal components of the inputs, or right singular vectors of the gradient."""
    model = tunerkit.calibrate(wrapped(start), [(X[:30],), (X[30:],)], loss=loss_of)
    base = network().requires_grad_(True)
    for half in (X[:30], X[30:]):
        loss_of(base(half), None).backward()
    inputs = {"0": X, "2": torch.tanh(base[0](X)).detach()}
    for path, layer in tunerkit.tuner(model).adapters().items():
        assert isinstance(layer, SvdLayer)
        matrix = inputs[path] - inputs[path].mean(0)
        if start == "gradients":
            found = base.get_submodule(path).get_parameter("weight").grad
            assert found is not None
            matrix = found
        expected = torch.linalg.svd(matrix, full_matrices=False).Vh[:4]
        assert float(torch.cosine_similarity(layer.q.detach(), expected).abs().min()) > 0.999
        assert not layer.p.any()
        assert torch.equal(layer.lam.detach(), torch.ones(4))
    assert torch.equal(model.requires_grad_(False)(X), network()(X))


def test_a_direction_without_length_is_left_out() -> None:
    """Law: the data may have fewer directions than the rank. A row of zeros is none: divided by 0 it would be NaN."""
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -2.0]])
    assert torch.equal(unit_rows(rows), torch.tensor([[0.6, 0.8], [0.0, -1.0]]))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("exact_svd", [False, True])
def test_it_trains_and_prunes_to_the_budget(start: str, exact_svd: bool, tmp_path: Path) -> None:
    """Law: the start changes nothing of the schedule, and the file holds what was trained."""
    model = tunerkit.calibrate(wrapped(start, exact_svd=exact_svd), [(X,)], loss=loss_of)
    train(model)
    assert sum(tunerkit.tuner(model).ranks().values()) == 4
    assert torch.equal(tunerkit.load(network(), tunerkit.save(model, tmp_path))(X), model(X))


@pytest.mark.parametrize("start", STARTS)
def test_it_is_not_trained_without_data(start: str) -> None:
    """Law: attaching says which call is missing."""
    with pytest.raises(
        StepError, match=rf"start '{start}' is computed from data.*tunerkit.calibrate\(model, batches\)"
    ):
        train(wrapped(start))


@pytest.mark.parametrize("start", ["pissa", "olora", "loftq"])
def test_a_start_that_pruning_would_undo_is_refused(start: str) -> None:
    """Law: a triplet of the weight that was subtracted would be taken from the base when it is pruned."""
    with pytest.raises(ConfigError, match=f"'{start}'"):
        wrapped(start)
