"""Shrinking: dead triplets are removed from parameters, gradients and optimizer state; nothing else changes."""

import copy
import functools
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunerkit
from plugins.adalora.tests.short_training import layers
from tests.support.model_checks import silent, told
from tunerkit_adalora.training import training_of
from tunerkit_testing.small import SHAPES, TARGETS, X, closure_of, loss_of, net, train, trainable

TOTAL = 40
FINAL = 14  # the last allocation
SETTINGS: dict[str, Any] = {
    "target_rank": 2, "init_rank": 5, "exact_svd": True, "t_init": 4, "t_final": TOTAL - FINAL, "delta_t": 3,
    "targets": TARGETS,
}  # fmt: skip
BUDGET, WHOLE = 6, 15

Optimizers = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
ELEMENTWISE: dict[str, Optimizers] = {
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamw loop": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    # Only the step matters: a subclass with another name is elementwise like its parent.
    "a subclass of adamw": lambda p: type("MyAdamW", (torch.optim.AdamW,), {})(p, lr=1e-2),
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


def started(name: str | Optimizers = "adamw foreach", **changes: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = tunerkit.wrap(net(), "adalora", {**SETTINGS, **changes}, seed=0)
    optimizer = (ELEMENTWISE[name] if isinstance(name, str) else name)(trainable(model))
    tunerkit.attach(model, optimizer, total_steps=TOTAL)
    return model, optimizer


def in_memory(model: nn.Module) -> int:
    """The triplets of all layers, live or masked. The ranks are those of the masks."""
    masks = zip(TARGETS, (layer.mask for layer in layers(model)), strict=True)
    assert tunerkit.tuner(model).ranks() == {path: int(mask.sum()) for path, mask in masks}
    return sum(len(layer.lam) for layer in layers(model))


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
    assert sum(ranks) == BUDGET
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


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("keep_loss", [False, True], ids=["", "earlier loss alive"])
def test_training_continues_as_the_masked_run_would(name: str, keep_loss: bool) -> None:
    """With γ = 0 and no clipping, outputs, losses of 20 steps and the live weights agree within 1e-5."""
    masked, weights = masked_run(name)
    model, optimizer = started(name)
    train(model, optimizer, FINAL - 1)
    alive = loss_of(model) if keep_loss else None  # its graph remembers the old shapes
    losses = train(model, optimizer, 1 + 20)
    assert in_memory(model) == BUDGET
    assert masked == pytest.approx(losses, abs=1e-5)
    for one, other in zip(weights, live_weights(model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert losses[-1] < losses[0]
    assert (alive is not None) == keep_loss


@functools.cache
def masked_run(name: str) -> tuple[list[float], list[Tensor]]:
    """The losses of 20 steps with masks, and the live weights after them; masks that were asked for are no warning."""
    model, optimizer = started(name, shrink=False)
    train(model, optimizer, FINAL - 1)
    with silent() if name == "sgd" else nullcontext():
        losses = train(model, optimizer, 1 + 20)
    assert in_memory(model) == WHOLE
    return losses, live_weights(model)


class OwnStep(torch.optim.SGD):
    """An unknown optimizer: its step may use whole tensors."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        return super().step(closure)


WHOLE_TENSORS: dict[str, Optimizers] = {
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.01, max_iter=1),
    "OwnStep": lambda p: OwnStep(p, lr=1e-2),
}


@pytest.mark.parametrize("name", WHOLE_TENSORS)
def test_where_shapes_must_stay_masks_do_and_it_is_said_once(name: str) -> None:
    """With factored or unknown state nothing is cut, masks stay to the end, and one warning says why."""
    model, optimizer = started(WHOLE_TENSORS[name])
    texts = told(lambda: [optimizer.step(closure_of(model, optimizer)) for _ in range(TOTAL)])
    assert [name in text for text in texts if "masked triplets stay in memory" in text] == [True]
    assert in_memory(model) == WHOLE
    assert sum(layer.rank for layer in layers(model)) == BUDGET
    assert not torch.cat([layer.lam[~layer.mask] for layer in layers(model)]).any()


def test_finish_shrinks_too_with_the_optimizer_that_drove_last() -> None:
    """It makes the final allocation, also after training when nothing drives any more; later steps work."""
    model, optimizer = started()
    train(model, optimizer, 6)
    tunerkit.tuner(model).finish()
    assert in_memory(model) == BUDGET
    losses = train(model, optimizer, 3)
    assert losses[-1] < losses[0]


def test_a_budget_that_buys_nothing_leaves_something_to_train() -> None:
    """The first triplet of the ranking is too expensive: all are masked and none cut, so backward still works."""
    model, optimizer = started(target_rank=None, budget=11, budget_unit="parameters", init_rank=1)
    train(model, optimizer, TOTAL)
    if all(layer.rank == 0 for layer in layers(model)):
        assert all(len(layer.lam) == 1 for layer in layers(model))
    assert sum(layer.rank * cost for layer, cost in zip(layers(model), (15, 16, 11), strict=True)) <= 11


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
    loaded = tunerkit.load(net(), tunerkit.save(model, tmp_path), trainable=True)
    assert in_memory(loaded) == BUDGET
    again = ELEMENTWISE["adamw foreach"](trainable(loaded))
    tunerkit.attach(loaded, again, total_steps=TOTAL)
    tuner = tunerkit.tuner(loaded)
    assert tuner.budget(0) == tuner.budget(TOTAL) == BUDGET
    losses = train(loaded, again, TOTAL)
    assert tuner.ranks() == tunerkit.tuner(model).ranks()
    assert losses[-1] < losses[0]


def test_targets_without_a_triplet_are_loaded_and_merged(tmp_path: Path) -> None:
    """Outputs are equal, and the base is bit-identical after unwrapping."""
    model, optimizer = started(budget=2, target_rank=None)
    train(model, optimizer, TOTAL)
    assert 0 in tunerkit.tuner(model).ranks().values()
    adapted = model(X).detach()
    assert torch.equal(tunerkit.load(net(), tunerkit.save(model, tmp_path))(X), adapted)
    tunerkit.merge(model)
    assert (model(X) - adapted).abs().max() <= 1e-5 * adapted.abs().max()
    tunerkit.unmerge(model)
    assert torch.equal(model(X), adapted)
    assert all(torch.equal(a, b) for a, b in zip(tunerkit.unwrap(model).parameters(), net().parameters(), strict=True))
