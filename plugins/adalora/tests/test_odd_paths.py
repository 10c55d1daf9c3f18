"""Operations besides training with AdaLoRA: copy, move, reload, autocast."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tunerkit
from plugins.adalora.tests import short_training
from plugins.adalora.tests.short_training import TOTAL, attached, everything, layers, live, same
from tunerkit_testing.small import LABELS, TARGETS, X, net

HALF = 8


def wrapped(model: nn.Module | None = None, **changes: Any) -> nn.Module:
    return short_training.wrapped(model, **{"exact_svd": True, "shrink": True, **changes})


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, x: Tensor = X) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).float(), LABELS).backward()
        optimizer.step()


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """All values of a training that nothing happens to."""
    model = wrapped()
    train(model, attached(model), TOTAL)
    return everything(model)


def test_a_copy_of_a_half_pruned_training_is_independent(alone: dict[str, Any]) -> None:
    """Weights, masks, averages, steps and history are separate; both trainings end as each alone would."""
    model = wrapped()
    optimizer = attached(model)
    train(model, optimizer, HALF)
    half = everything(model)
    twin = copy.deepcopy(model)
    assert same(everything(twin), half)
    assert tunerkit.tuner(twin).history
    # A new run of the copy restarts the schedule and ends pruned, on other data.
    train(twin, attached(twin), TOTAL, -X)
    assert same(everything(model), half)
    assert live(twin) == 6
    pruned = everything(twin)
    train(model, optimizer, TOTAL - HALF)
    assert same(everything(twin), pruned)
    assert same(everything(model), alone)


def test_a_copy_can_resume_where_the_original_is(tmp_path: Path, alone: dict[str, Any]) -> None:
    """With the training states of the original and its optimizer, the copy ends as the original would."""
    model = wrapped()
    optimizer = attached(model)
    train(model, optimizer, HALF)
    twin = copy.deepcopy(model)
    second = attached(twin)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    tunerkit.load_state(twin, tunerkit.save_state(model, tmp_path))
    train(twin, second, TOTAL - HALF)
    assert same(everything(twin), alone)


def test_a_second_attach_trains_the_layers_that_are_there(alone: dict[str, Any]) -> None:
    """Slots restored by hand from a copy are other modules than those of the first training."""
    model = wrapped()
    before = [copy.deepcopy(model.get_submodule(f"{place}.tunerkit")) for place in TARGETS]
    train(model, attached(model), HALF)
    for place, slots in zip(TARGETS, before, strict=True):
        model.get_submodule(place).tunerkit = slots
    with pytest.warns(tunerkit.TunerkitWarning, match="restarts at step 0"):
        again = attached(model)
    train(model, again, TOTAL)
    assert same(everything(model), alone)


def test_a_removed_adapter_is_an_error_before_anything_changes(alone: dict[str, Any]) -> None:
    """The error comes at the next step and at `finish`; once the adapter is back, training continues unaffected."""
    model = wrapped()
    optimizer = attached(model)
    train(model, optimizer, HALF)
    half = everything(model)
    torn = model.get_submodule("2")._modules.pop("tunerkit")
    for asked in (optimizer.step, tunerkit.tuner(model).finish):
        with pytest.raises(tunerkit.errors.AdapterError, match="gone from the model at '2'"):
            asked()
    model.get_submodule("2")._modules["tunerkit"] = torn
    assert same(everything(model), half)
    train(model, optimizer, TOTAL - HALF)
    assert same(everything(model), alone)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "when", [2, HALF, 16], ids=["before the first allocation", "between two", "in the final phase"]
)
def test_training_reaches_the_budget_after_a_change_of_dtype(dtype: torch.dtype, when: int) -> None:
    """`.to(dtype)` converts weights but not masks, and the budget is exact."""
    model = wrapped()
    optimizer = attached(model, make=torch.optim.SGD)
    train(model, optimizer, when)
    masks = [layer.mask.clone() for layer in layers(model)]
    model.to(dtype)
    assert all(torch.equal(layer.mask, mask) for layer, mask in zip(layers(model), masks, strict=True))
    assert {layer.mask.dtype for layer in layers(model)} == {torch.bool}
    train(model, optimizer, TOTAL - when, X.to(dtype))
    tuner = tunerkit.tuner(model)
    assert {p.dtype for p in tuner.parameters()} == {dtype}
    assert [change.step for change in tuner.history] == [6, 9, 12, 14]
    assert live(model) == tuner.budget() == 6
    assert model(X.to(dtype)).isfinite().all()


@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_as_full_precision_within_its_digits(dtype: torch.dtype, adapter_dtype: str) -> None:
    """On the CPU, with adapters in any dtype: outputs agree within the dtype's tolerance, and the budget is exact."""
    plain, model = wrapped(), wrapped(adapter_dtype=adapter_dtype)
    optimizers = [attached(each, make=torch.optim.SGD) for each in (plain, model)]
    assert {p.dtype for p in tunerkit.tuner(model).parameters()} == {getattr(torch, adapter_dtype)}
    train(plain, optimizers[0], TOTAL)
    for _ in range(TOTAL):
        with torch.autocast("cpu", dtype=dtype):
            loss = nn.functional.cross_entropy(model(X).float(), LABELS)
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
    with torch.autocast("cpu", dtype=dtype):
        output = model(X)
    assert output.dtype == dtype
    assert (output - plain(X)).abs().max() <= 0.03 * plain(X).abs().max()
    assert not torch.allclose(plain(X), wrapped()(X), atol=1e-3)
    assert live(model) == 6


def test_an_offloaded_model_is_pruned_as_the_model_itself() -> None:
    """Hooks of accelerate load the base's weights for each forward: masks and history are equal, weights close.

    While weights are offloaded the plain form of the low-rank product is used, which rounds differently.
    """
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    pytest.importorskip("tunerkit_distributed", reason="it knows accelerate's hooks")
    plain, base = wrapped(), net()
    offloaded = wrapped(accelerate.cpu_offload(base, execution_device=torch.device("cpu")))
    assert all(p.is_meta for p in base.parameters() if not p.requires_grad)
    for model in (plain, offloaded):
        train(model, attached(model), TOTAL)
    for found, expected in zip(layers(offloaded), layers(plain), strict=True):
        assert torch.equal(found.mask, expected.mask)
        for weight, other in zip(found.weights, expected.weights, strict=True):
            assert torch.allclose(weight, other, rtol=1e-4, atol=1e-5)
    assert tunerkit.tuner(offloaded).history == tunerkit.tuner(plain).history
    assert torch.allclose(offloaded(X), plain(X), rtol=1e-4, atol=1e-5)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def test_checkpointed_blocks_are_pruned_as_others() -> None:
    """Recomputed in backward, they give bit-identical gradients, averages, masks and weights."""
    models = [wrapped(Checkpointed(reentrant), targets=["blocks.*.[02]"]) for reentrant in (None, False, True)]
    for model in models:
        train(model, attached(model), TOTAL)
    plain, *others = map(everything, models)
    assert all(same(other, plain) for other in others)
    assert live(models[0]) == 8
