"""Operations besides training with AdaLoRA: copy, move, reload, autocast."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tunerkit
from plugins.adalora.tests import short_training
from plugins.adalora.tests.short_training import attached, layers
from tunerkit_adalora.training import training_of
from tunerkit_testing.small import LABELS, TARGETS, X

TOTAL, HALF = short_training.TOTAL, 8
SETTINGS = {**short_training.SETTINGS, "exact_svd": True, "shrink": True}


def wrapped(**changes: Any) -> nn.Module:
    return short_training.wrapped(**{**SETTINGS, **changes})


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, x: Tensor = X) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).float(), LABELS).backward()
        optimizer.step()


def everything(model: nn.Module) -> dict[str, Any]:
    """Copies of all values that training changes."""
    tuner, training = tunerkit.tuner(model), training_of(tunerkit.tuner(model))
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "averages": dict(enumerate(t.clone() for t in itertools.chain(*training.averages))),
        "numbers": (tuner.steps, tuner.budget(), tuner.ranks(), list(tuner.history), training.last_step),
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    if one["numbers"] != other["numbers"]:
        return False
    pairs = [(one[key], other[key]) for key in ("weights", "averages")]
    return all(a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items()) for a, b in pairs)


def test_a_copy_of_a_half_pruned_training_is_independent(tmp_path: Path) -> None:
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
    assert sum(tunerkit.tuner(twin).ranks().values()) == 6
    pruned = everything(twin)
    train(model, optimizer, TOTAL - HALF)
    assert same(everything(twin), pruned)
    assert not same(everything(model), pruned)
    alone = wrapped()
    train(alone, attached(alone), TOTAL)
    assert same(everything(model), everything(alone))


def test_a_copy_can_resume_where_the_original_is(tmp_path: Path) -> None:
    """With the training states of the original and its optimizer, the copy's further steps are bit-identical."""
    model = wrapped()
    optimizer = attached(model)
    train(model, optimizer, HALF)
    twin = copy.deepcopy(model)
    tunerkit.save_state(model, tmp_path)
    second = attached(twin)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    tunerkit.load_state(twin, tmp_path)
    train(twin, second, TOTAL - HALF)
    train(model, optimizer, TOTAL - HALF)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in twin.state_dict().items())
    assert tunerkit.tuner(twin).ranks() == tunerkit.tuner(model).ranks()


def test_a_second_attach_trains_the_layers_that_are_there() -> None:
    """Slots restored by hand from a copy are other modules than those of the first training."""
    model = wrapped()
    before = [copy.deepcopy(model.get_submodule(f"{place}.tunerkit")) for place in TARGETS]
    train(model, attached(model), HALF)
    for place, slots in zip(TARGETS, before, strict=True):
        model.get_submodule(place).tunerkit = slots
    with pytest.warns(tunerkit.TunerkitWarning, match="restarts at step 0"):
        again = attached(model)
    train(model, again, TOTAL)
    alone = wrapped()
    train(alone, attached(alone), TOTAL)
    assert same(everything(model), everything(alone))


@pytest.mark.parametrize("place", ["0", "2", "4"])
def test_a_removed_adapter_is_an_error_before_anything_changes(place: str) -> None:
    """The error comes at the next step and at `finish`; once the adapter is back, training continues unaffected."""
    model, alone = wrapped(), wrapped()
    optimizer, other = attached(model), attached(alone)
    train(model, optimizer, HALF)
    train(alone, other, HALF)
    half = everything(model)
    torn = model.get_submodule(place)._modules.pop("tunerkit")
    for asked in (optimizer.step, tunerkit.tuner(model).finish):
        with pytest.raises(tunerkit.errors.AdapterError, match=f"gone from the model at '{place}'"):
            asked()
    model.get_submodule(place)._modules["tunerkit"] = torn
    assert same(everything(model), half)
    train(model, optimizer, TOTAL - HALF)
    train(alone, other, TOTAL - HALF)
    assert same(everything(model), everything(alone))


def test_weights_of_a_parametrised_layer_are_its_attributes() -> None:
    """A parametrised factor is no longer a parameter of the layer."""
    model = wrapped()
    layer = layers(model)[0]
    torch.nn.utils.parametrize.register_parametrization(layer, "q", nn.Identity())
    assert all(a is b for a, b in zip(layer.weights[:2], (layer.p, layer.lam), strict=True))
    assert torch.equal(layer.weights[2], layer.q)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("when", [2, HALF, 16])
def test_training_reaches_the_budget_after_a_change_of_dtype(dtype: torch.dtype, when: int) -> None:
    """`model.to(dtype)` before the first allocation, between two, or in the final phase: the budget is exact."""
    model = wrapped()
    optimizer = attached(model, make=torch.optim.SGD)
    train(model, optimizer, when)
    model.to(dtype)
    train(model, optimizer, TOTAL - when, X.to(dtype))
    tuner = tunerkit.tuner(model)
    assert {p.dtype for p in tuner.parameters()} == {dtype}
    assert [change.step for change in tuner.history] == [6, 9, 12, 14]
    assert sum(tuner.ranks().values()) == tuner.budget() == 6
    assert model(X.to(dtype)).isfinite().all()


@pytest.mark.parametrize("assign", [False, True])
def test_masks_come_back_from_meta_with_the_weights(assign: bool) -> None:
    """to("meta"), then a state_dict with assign=True or into to_empty: every mask is restored."""
    source = wrapped()
    train(source, attached(source), HALF)
    model = wrapped().to("meta")
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict(), assign=assign)
    assert [layer.mask.tolist() for layer in layers(model)] == [layer.mask.tolist() for layer in layers(source)]
    assert torch.equal(model(X), source(X))
    train(model, attached(model), TOTAL)
    assert sum(tunerkit.tuner(model).ranks().values()) == 6


@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_as_full_precision_within_its_digits(dtype: torch.dtype, adapter_dtype: str) -> None:
    """On the CPU, with adapters in any dtype: outputs agree within the dtype's tolerance, and the budget is exact."""
    plain, model = wrapped(), wrapped(adapter_dtype=adapter_dtype)
    optimizers = [attached(each, make=torch.optim.SGD) for each in (plain, model)]
    assert {p.dtype for p in tunerkit.tuner(model).parameters()} == {getattr(torch, adapter_dtype)}
    for _ in range(TOTAL):
        with torch.autocast("cpu", dtype=dtype):
            loss = nn.functional.cross_entropy(model(X).float(), LABELS)
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
    train(plain, optimizers[0], TOTAL)
    with torch.autocast("cpu", dtype=dtype):
        output = model(X)
    assert output.dtype == dtype
    assert (output - plain(X)).abs().max() <= 0.03 * plain(X).abs().max()
    assert not torch.allclose(plain(X), wrapped()(X), atol=1e-3)
    assert sum(tunerkit.tuner(model).ranks().values()) == 6


def test_an_offloaded_model_is_pruned_as_the_model_itself(tmp_path: Path) -> None:
    """Hooks of accelerate load the base's weights for each forward: masks and history are equal, weights close.

    While weights are offloaded the plain form of the low-rank product is used, which rounds differently.
    """
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    pytest.importorskip("tunerkit_distributed", reason="it knows accelerate's hooks")
    plain = wrapped()
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))
    offloaded = accelerate.cpu_offload(base, execution_device=torch.device("cpu"))
    tunerkit.wrap(offloaded, "adalora", SETTINGS, seed=0)
    assert all(p.is_meta for p in base.parameters() if not p.requires_grad)
    for model in (plain, offloaded):
        train(model, attached(model), TOTAL)
    own = [adapter.state_dict() for adapter in (*layers(plain), *layers(offloaded))]
    assert len(own) == 6
    for found, expected in zip(own[3:], own[:3], strict=True):
        assert torch.equal(found["mask"], expected["mask"])
        assert all(torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-5) for name in ("p", "lam", "q"))
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


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_are_pruned_as_others(reentrant: bool) -> None:
    """Recomputed in backward, they give bit-identical gradients, averages, masks and weights."""
    models = [Checkpointed(None), Checkpointed(reentrant)]
    for model in models:
        tunerkit.wrap(model, "adalora", {**SETTINGS, "targets": ["blocks.*.[02]"], "dropout": 0.0}, seed=0)
        train(model, attached(model), TOTAL)
    one, other = map(everything, models)
    assert same(one, other)
    assert sum(tunerkit.tuner(models[1]).ranks().values()) == 8
