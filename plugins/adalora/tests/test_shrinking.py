"""Shrinking: dead triplets are removed from parameters, gradients and optimizer state; nothing else changes."""

import copy
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunerkit
from plugins.adalora.tests.short_training import layers
from tunerkit.plugin import resize_
from tunerkit_adalora.training import training_of
from tunerkit_testing.small import SHAPES, TARGETS, X, loss_of, net, train, trainable

TOTAL = 40
FINAL = 14  # the last allocation
SETTINGS: dict[str, Any] = {
    "target_rank": 2, "init_rank": 5, "exact_svd": True, "t_init": 4, "t_final": TOTAL - FINAL, "delta_t": 3,
    "targets": TARGETS,
}  # fmt: skip
BUDGET = 6

Optimizers = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
ELEMENTWISE: dict[str, Optimizers] = {
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamw loop": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=1e-2),
}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return ELEMENTWISE["adamw foreach"](trainable(model))


def started(make: Optimizers | None = None, **changes: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = tunerkit.wrap(net(), "adalora", {**SETTINGS, **changes}, seed=0)
    optimizer = (make or ELEMENTWISE["adamw foreach"])(trainable(model))
    tunerkit.attach(model, optimizer, total_steps=TOTAL)
    return model, optimizer


def live_weights(model: nn.Module) -> list[Tensor]:
    """P, λ and Q of each layer without dead triplets, whether these are still in memory or not."""
    weights = []
    for layer in layers(model):
        weights += [layer.p[:, layer.mask], layer.lam[layer.mask], layer.q[layer.mask]]
    return weights


def test_parameters_and_optimizer_state_occupy_the_budget_s_storage() -> None:
    """Storage bytes, not views: weights, gradients and both of Adam's averages contain only live triplets."""
    model, optimizer = started()
    before = [id(p) for p in trainable(model)]
    train(model, optimizer, FINAL)
    ranks = [layer.rank for layer in layers(model)]
    assert sum(ranks) == BUDGET < sum([5, 5, 5])
    expected = 4 * sum(rank * (out + 1 + into) for rank, (out, into) in zip(ranks, SHAPES, strict=True))
    own = list(tunerkit.tuner(model).parameters())
    assert sum(p.untyped_storage().nbytes() for p in own) == expected
    assert sum(p.grad.untyped_storage().nbytes() for p in own if p.grad is not None) == expected
    moved = [p for p in own if p in optimizer.state]
    assert len(moved) == len(own) - len(ranks)  # the optimizer has nothing of the λ, which it does not move
    for key in ("exp_avg", "exp_avg_sq"):
        assert sum(optimizer.state[p][key].untyped_storage().nbytes() for p in moved) == expected - 4 * sum(ranks)
    assert [id(p) for p in trainable(model)] == before
    assert training_of(tunerkit.tuner(model)).running == []


def test_outputs_before_and_after_shrinking_are_equal() -> None:
    """The same allocation with and without shrinking: the same masks, the same logits."""
    outputs = []
    for shrink in (False, True):
        model, optimizer = started(shrink=shrink)
        train(model, optimizer, FINAL)
        outputs.append(model(X).detach())
        assert sum(len(layer.lam) for layer in layers(model)) == (BUDGET if shrink else 15)
    assert (outputs[0] - outputs[1]).abs().max() <= 1e-5 * outputs[0].abs().max()


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("keep_loss", [False, True], ids=["", "earlier loss alive"])
def test_training_continues_as_the_masked_run_would(name: str, keep_loss: bool) -> None:
    """With γ = 0 and no clipping, losses of 20 steps and the live weights agree within 1e-5."""
    masked, weights = masked_run(name)
    model, optimizer = started(ELEMENTWISE[name])
    train(model, optimizer, FINAL - 1)
    alive = loss_of(model) if keep_loss else None  # its graph remembers the old shapes
    losses = train(model, optimizer, 1 + 20)
    assert_ranks(model, BUDGET)
    assert masked == pytest.approx(losses, abs=1e-5)
    for one, other in zip(weights, live_weights(model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert losses[-1] < losses[0]
    assert (alive is not None) == keep_loss


@functools.cache
def masked_run(name: str) -> tuple[list[float], list[Tensor]]:
    """The losses of 20 steps with masks, and the live weights after them."""
    model, optimizer = started(ELEMENTWISE[name], shrink=False)
    train(model, optimizer, FINAL - 1)
    losses = train(model, optimizer, 1 + 20)
    assert_ranks(model, 15)
    return losses, live_weights(model)


def assert_ranks(model: nn.Module, held: int) -> None:
    """The ranks are those of the masks, and memory holds so many triplets."""
    assert sum(len(layer.lam) for layer in layers(model)) == held
    assert tunerkit.tuner(model).ranks() == {
        path: int(layer.mask.sum()) for path, layer in zip(TARGETS, layers(model), strict=True)
    }


def test_an_earlier_loss_does_not_keep_the_old_shape() -> None:
    """A control: without the workaround in resize_, backward would raise about the shape of a gradient."""
    model, optimizer = started()
    train(model, optimizer, FINAL - 1)
    alive = loss_of(model)
    parameter = layers(model)[0].lam
    with torch.no_grad():
        parameter.data = parameter.data[:2].clone()
        layers(model)[0].p.data = layers(model)[0].p.data[:, :2].clone()
        layers(model)[0].q.data = layers(model)[0].q.data[:2].clone()
    with pytest.raises(RuntimeError, match="shape"):
        loss_of(model).backward()
    assert alive.requires_grad


def lbfgs(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, lr=0.01, max_iter=1)


class OwnStep(torch.optim.SGD):
    """An unknown optimizer: its step may use whole tensors."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        return super().step(closure)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: torch.optim.Adafactor(p, lr=1e-2), "Adafactor"),
        (lbfgs, "LBFGS"),
        (lambda p: OwnStep(p, lr=1e-2), "OwnStep"),
    ],
    ids=["factored", "whole tensors", "unknown"],
)
def test_where_shapes_must_stay_masks_do_and_it_is_said_once(make: Optimizers, words: str) -> None:
    """With factored or unknown state nothing is cut, masks stay to the end, and one warning says why."""
    model, optimizer = started(make)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", tunerkit.TunerkitWarning)
        for _ in range(TOTAL):
            optimizer.step(closure)  # type: ignore[arg-type]
    said = [str(w.message) for w in told if "stay in memory" in str(w.message)]
    assert len(said) == 1
    assert words in said[0]
    assert all(len(layer.lam) == 5 for layer in layers(model))
    assert sum(layer.rank for layer in layers(model)) == BUDGET
    assert not torch.cat([layer.lam[~layer.mask] for layer in layers(model)]).any()


def test_a_subclass_that_keeps_its_parent_s_step_shrinks() -> None:
    """Only the step matters: a subclass with another name or default is elementwise like its parent."""
    kind = type("MyAdamW", (torch.optim.AdamW,), {})
    model, optimizer = started(lambda p: kind(p, lr=1e-2))  # type: ignore[no-any-return]
    train(model, optimizer, FINAL)
    assert sum(len(layer.lam) for layer in layers(model)) == BUDGET


def test_the_config_can_opt_out() -> None:
    """With ``shrink=False`` masks stay to the end, without a warning."""
    model, optimizer = started(shrink=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", tunerkit.TunerkitWarning)
        train(model, optimizer, TOTAL)
    assert all(len(layer.lam) == 5 for layer in layers(model))


def test_finish_shrinks_too_with_the_optimizer_that_drove_last() -> None:
    """It makes the final allocation, also after training when nothing drives any more; later steps work."""
    model, optimizer = started()
    train(model, optimizer, 6)
    tunerkit.tuner(model).finish()
    assert sum(len(layer.lam) for layer in layers(model)) == BUDGET
    losses = train(model, optimizer, 3)
    assert losses[-1] < losses[0]


def test_a_budget_that_buys_nothing_leaves_something_to_train() -> None:
    """The first triplet of the ranking is too expensive: all are masked and none cut, so backward still works."""
    model, optimizer = started(target_rank=None, budget=11, budget_unit="parameters", init_rank=1)
    train(model, optimizer, TOTAL)
    if all(layer.rank == 0 for layer in layers(model)):
        assert all(len(layer.lam) == 1 for layer in layers(model))
    assert sum(layer.rank * cost for layer, cost in zip(layers(model), (15, 16, 11), strict=True)) <= 11


@pytest.mark.parametrize("at", [5, 9, FINAL - 1, FINAL, FINAL + 3, TOTAL - 1])
def test_a_plain_loop_resumes_bit_identically_around_shrinking(at: int, tmp_path: Path) -> None:
    """Weights, masks, averages and Adam's state of the resumed run equal those of the uninterrupted run."""
    whole, optimizer = started()
    train(whole, optimizer, at)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tunerkit.TunerkitWarning)
        tunerkit.save(whole, tmp_path)
    tunerkit.save_state(whole, tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    history = list(tunerkit.tuner(whole).history)

    part = tunerkit.load(net(), tmp_path, trainable=True)
    again = adamw(part)
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    tunerkit.attach(part, again, total_steps=TOTAL)
    tunerkit.load_state(part, tmp_path)
    assert tunerkit.tuner(part).history == history
    assert train(part, again, TOTAL - at) == train(whole, optimizer, TOTAL - at)
    assert_same_run((part, again), (whole, optimizer))


def assert_same_run(
    one: tuple[nn.Module, torch.optim.Optimizer], other: tuple[nn.Module, torch.optim.Optimizer]
) -> None:
    states = [run[0].state_dict() for run in (one, other)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    moments = [run[1].state_dict()["state"] for run in (one, other)]
    assert moments[0].keys() == moments[1].keys()
    for key in moments[0]:
        assert all(torch.equal(moments[0][key][name], moments[1][key][name]) for name in moments[0][key])
    tuners = [tunerkit.tuner(run[0]) for run in (one, other)]
    assert tuners[0].ranks() == tuners[1].ranks()
    assert tuners[0].history == tuners[1].history
    assert (tuners[0].steps, tuners[0].budget()) == (tuners[1].steps, tuners[1].budget())


def test_a_layer_without_triplets_has_memory_in_a_state_dict() -> None:
    """Otherwise accelerate takes it for shared: it leaves out all but one of the tensors at one address."""
    model = tunerkit.wrap(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "adalora", {"targets": ["0", "1"]})
    adapters: list[Any] = list(tunerkit.tuner(model).adapters().values())
    for adapter in adapters:
        for parameter, shape in ((adapter.p, (4, 0)), (adapter.lam, (0,)), (adapter.q, (0, 4))):
            resize_(parameter, torch.empty(shape))
        adapter.set_mask(adapter.mask[:0], rank=0)
    own = {name: tensor for name, tensor in model.state_dict().items() if not tensor.numel()}
    assert len(own) == 8
    assert len({tensor.untyped_storage().data_ptr() for tensor in own.values()}) == 8
    assert all(tensor.shape == model.state_dict(keep_vars=True)[name].shape for name, tensor in own.items())


@pytest.mark.parametrize("direction", ["smaller", "larger"])
def test_load_state_dict_on_a_live_model_takes_other_ranks(direction: str) -> None:
    """A checkpoint with other ranks resizes the model, then loads; Parameter objects stay the same."""
    shrunk, optimizer = started()
    train(shrunk, optimizer, FINAL)
    full, _ = started()
    source, target = (shrunk, full) if direction == "smaller" else (full, shrunk)
    before = [id(p) for p in trainable(target)]
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    assert [id(p) for p in trainable(target)] == before
    assert torch.equal(target(X), source(X))
    assert tunerkit.tuner(target).ranks() == tunerkit.tuner(source).ranks()


def test_a_step_after_loading_other_ranks_without_their_optimizer_is_refused() -> None:
    """The optimizer's state has the old shapes: the error says what else to load."""
    model, optimizer = started()
    train(model, optimizer, 3)
    shrunk, other = started()
    train(shrunk, other, FINAL)
    model.load_state_dict(shrunk.state_dict())
    loss_of(model).backward()
    with pytest.raises(tunerkit.errors.StepError, match=r"other ranks.*load_state"):
        optimizer.step()


def test_training_on_a_shrunk_adapter_keeps_its_triplets(tmp_path: Path) -> None:
    """Loaded and attached after shrinking, the budget starts with the remaining triplets, and training works."""
    model, optimizer = started()
    train(model, optimizer, TOTAL)
    ranks = tunerkit.tuner(model).ranks()
    loaded = tunerkit.load(net(), tunerkit.save(model, tmp_path), trainable=True)
    assert sum(len(layer.lam) for layer in layers(loaded)) == BUDGET
    again = adamw(loaded)
    tunerkit.attach(loaded, again, total_steps=TOTAL)
    tuner = tunerkit.tuner(loaded)
    assert tuner.budget(0) == tuner.budget(TOTAL) == BUDGET
    losses = train(loaded, again, TOTAL)
    assert tuner.ranks() == ranks
    assert losses[-1] < losses[0]


def test_merging_unmerging_and_unwrapping_after_shrinking(tmp_path: Path) -> None:
    """Also with targets that have no triplet left: outputs are equal, the base bit-identical."""
    model, optimizer = started(budget=2, target_rank=None)
    train(model, optimizer, TOTAL)
    assert 0 in tunerkit.tuner(model).ranks().values()
    adapted = model(X).detach()
    loaded = tunerkit.load(net(), tunerkit.save(model, tmp_path))
    assert torch.equal(loaded(X), adapted)
    tunerkit.merge(model)
    assert (model(X) - adapted).abs().max() <= 1e-5 * adapted.abs().max()
    tunerkit.unmerge(model)
    assert torch.equal(model(X), adapted)
    assert all(torch.equal(a, b) for a, b in zip(tunerkit.unwrap(model).parameters(), net().parameters(), strict=True))
