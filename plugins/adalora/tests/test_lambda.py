"""An untrained Λ, set by the SVD at each allocation: between allocations it stays unchanged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tunerkit
from plugins.adalora.tests.short_training import TOTAL, layers, wrapped
from tunerkit_adalora.training import training_of
from tunerkit_testing.small import closure_of, loss_of, net, train, trainable

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": lambda own: torch.optim.AdamW(own, lr=1e-2, weight_decay=0.1),
    "fused AdamW": lambda own: torch.optim.AdamW(own, lr=1e-2, weight_decay=0.1, fused=True),
    "SGD": lambda own: torch.optim.SGD(own, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "LBFGS": lambda own: torch.optim.LBFGS(own, lr=1e-2, max_iter=3),
}


def started(make: Callable[..., torch.optim.Optimizer], **changes: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = wrapped(**{"exact_svd": True, "total_steps": TOTAL, **changes})
    optimizer = make(trainable(model))
    tunerkit.attach(model, optimizer)
    return model, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_lambda_moves_at_allocations_and_at_no_other_step(name: str) -> None:
    """Momentum, weight decay and line searches don't change it; P and Q change at every step."""
    model, optimizer = started(OPTIMIZERS[name])
    for number in range(1, TOTAL + 1):
        before = [(layer.p.detach().clone(), layer.lam.detach().clone()) for layer in layers(model)]
        optimizer.step(closure_of(model, optimizer))
        for layer, (p, lam) in zip(layers(model), before, strict=True):
            assert torch.equal(layer.lam, lam) == (number not in (6, 9, 12, 14))
            assert not torch.equal(layer.p, p)


def test_its_gradient_is_there_after_the_step_and_counts_for_the_scores() -> None:
    """The gradient is hidden only from the optimizer: logging after a step, and importance, see it as usual."""
    model, optimizer = started(OPTIMIZERS["AdamW"])
    train(model, optimizer, 1)  # at the first step P = 0, and with it the gradients of λ
    optimizer.zero_grad()
    loss_of(model).backward()
    expected = [layer.lam.grad.clone() for layer in layers(model) if layer.lam.grad is not None]
    optimizer.step()
    assert len(expected) == len(layers(model))
    for layer, grad in zip(layers(model), expected, strict=True):
        assert layer.lam.grad is not None
        assert torch.equal(layer.lam.grad, grad)
    sensitivity, _ = training_of(tunerkit.tuner(model)).averages
    assert all((average > 0).all() for average in sensitivity[1::3])


def test_train_lambda_lets_the_optimizer_move_it() -> None:
    """As in the paper."""
    model, optimizer = started(OPTIMIZERS["AdamW"], train_lambda=True)
    train(model, optimizer, 2)
    assert not any(torch.equal(layer.lam.detach(), torch.ones(4)) for layer in layers(model))


def test_a_masked_triplet_does_not_come_back_where_nothing_would_move_it() -> None:
    """If λ is neither rotated nor trained, it stays 0, whatever the averages: no budget is spent on it."""
    changes = {"exact_svd": False, "train_lambda": False, "init_rank": 6, "t_init": 10, "t_final": 30, "delta_t": 1}
    model, optimizer = started(lambda own: torch.optim.AdamW(own, lr=1e-3), total_steps=100, **changes)
    for _ in range(100):
        train(model, optimizer, 1)
        live = [layer.mask & (layer.lam != 0) for layer in layers(model)]
        assert sum(int(mask.sum()) for mask in live) == tunerkit.tuner(model).budget()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("exact_svd", [False, True], ids=["plain", "SVD form"])
def test_an_unused_part_of_a_budget_in_parameters_buys_no_dead_triplet(seed: int, exact_svd: bool) -> None:
    """An expensive triplet may leave part of the budget unused: later, masks only shrink, and no live λ is near 0."""
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 90), nn.Tanh())
    base.append(nn.Linear(90, 40))
    config = {"targets": "all-linear", "target_rank": 1, "init_rank": 4, "budget_unit": "parameters", "t_init": 5,
              "t_final": 10, "delta_t": 1, "shrink": False, "exact_svd": exact_svd, "train_lambda": False}  # fmt: skip
    model = tunerkit.wrap(base, "adalora", config, seed=seed)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    tunerkit.attach(model, optimizer, total_steps=100)
    before = [layer.mask.clone() for layer in layers(model)]
    for _ in range(100):
        model(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for layer, mask in zip(layers(model), before, strict=True):
            assert not (layer.mask & ~mask).any()
            assert torch.equal(layer.lam != 0, layer.mask)
            if exact_svd and layer.rank:
                assert layer.lam.max() < 1e3 * layer.lam[layer.mask].min()
        before = [layer.mask.clone() for layer in layers(model)]
    costs = [layer.p.shape[0] + layer.q.shape[1] + 1 for layer in layers(model)]
    assert tunerkit.tuner(model).budget() == sum(costs)
    spent = sum(layer.rank * cost for layer, cost in zip(layers(model), costs, strict=True))
    assert sum(costs) - max(costs) < spent <= sum(costs)


def test_dead_triplets_of_a_loaded_adapter_go_at_the_first_allocation(tmp_path: Path) -> None:
    """After attaching again all triplets exist, but those with λ = 0 learn nothing: no allocation keeps them."""
    model, optimizer = started(OPTIMIZERS["AdamW"])
    train(model, optimizer, TOTAL)
    kept = [layer.mask.clone() for layer in layers(model)]
    assert sum(int(mask.sum()) for mask in kept) == 6
    loaded = tunerkit.load(net(), tunerkit.save(model, tmp_path), trainable=True)
    again = OPTIMIZERS["AdamW"](trainable(loaded))
    tunerkit.attach(loaded, again)
    train(loaded, again, 5)
    assert all(layer.mask.all() for layer in layers(loaded))
    for number in range(6, TOTAL + 1):
        train(loaded, again, 1)
        assert all(torch.equal(layer.mask, mask) for layer, mask in zip(layers(loaded), kept, strict=True)), number
