"""An untrained Λ, set by the SVD at each allocation: between allocations it stays unchanged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunerkit
from plugins.adalora.tests.short_training import TOTAL, layers, wrapped
from tunerkit_adalora import AdaLoraConfig
from tunerkit_adalora.training import training_of
from tunerkit_testing.small import TARGETS, closure_of, loss_of, net, train, trainable

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


def lambdas(model: nn.Module) -> list[Tensor]:
    return [layer.lam.detach().clone() for layer in layers(model)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_lambda_moves_at_allocations_and_at_no_other_step(name: str) -> None:
    """Momentum, weight decay and line searches don't change it; P and Q change at every step."""
    model, optimizer = started(OPTIMIZERS[name])
    for number in range(1, TOTAL + 1):
        before = lambdas(model), [layer.p.detach().clone() for layer in layers(model)]
        optimizer.step(closure_of(model, optimizer))
        same = [torch.equal(layer.lam, old) for layer, old in zip(layers(model), before[0], strict=True)]
        assert not any(same) if number in (6, 9, 12, 14) else all(same)
        assert not any(torch.equal(layer.p, old) for layer, old in zip(layers(model), before[1], strict=True))


def test_its_gradient_is_there_after_the_step_and_counts_for_the_scores() -> None:
    """The gradient is hidden only from the optimizer: logging after a step, and importance, see it as usual."""
    model, optimizer = started(OPTIMIZERS["AdamW"])
    loss_of(model).backward()
    expected = [layer.lam.grad.clone() for layer in layers(model) if layer.lam.grad is not None]
    optimizer.step()
    found = [layer.lam.grad for layer in layers(model)]
    assert len(expected) == len(found) == len(TARGETS)
    for grad, wanted in zip(found, expected, strict=True):
        assert grad is not None
        assert torch.equal(grad, wanted)
    train(model, optimizer, 1)  # at the first step P = 0, and with it the gradients of λ
    sensitivity, _ = training_of(tunerkit.tuner(model)).averages
    assert all((average > 0).all() for average in sensitivity[1::3])


def test_one_lambda_for_two_targets_keeps_its_gradient() -> None:
    """A tied λ is withheld once, unscaled once if a fused optimizer would do that, and restored."""
    model, optimizer = started(OPTIMIZERS["fused AdamW"])
    first, second = layers(model)[:2]
    train(model, optimizer, 1)
    second.lam = first.lam
    optimizer.zero_grad()
    loss_of(model).backward()
    assert first.lam.grad is not None
    expected = first.lam.grad / 8
    seen: list[Tensor | None] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(first.lam.grad))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert seen == [None]
    assert torch.equal(first.lam.grad, expected)


@pytest.mark.parametrize("scale", [2.0**16, 3.0e4])
def test_its_gradient_is_there_after_a_step_that_a_fused_optimizer_skipped(scale: float) -> None:
    """It equals the one before the step, scaled like all others; the next step is unaffected by the skipped one."""
    model, optimizer = started(OPTIMIZERS["fused AdamW"])
    train(model, optimizer, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    optimizer.zero_grad()
    scaler.scale(loss_of(model)).backward()  # type: ignore[no-untyped-call]
    layers(model)[0].q.grad[0, 0] = torch.inf  # type: ignore[index]
    weights = [weight for layer in layers(model) for weight in layer.weights]
    expected = [weight.grad.clone() for weight in weights if weight.grad is not None]
    before = [weight.detach().clone() for weight in weights]
    scaler.step(optimizer)
    assert tunerkit.tuner(model).steps == 2
    assert len(expected) == len(weights)
    for weight, grad, old in zip(weights, expected, before, strict=True):
        assert weight.grad is not None
        assert torch.equal(weight.grad, grad)
        assert torch.equal(weight, old)


def test_a_step_that_raised_does_not_lose_its_gradient() -> None:
    """The optimizer is repaired and repeats the step: training ends as in a run without the error."""
    ends = []
    for fails in (False, True):
        model, optimizer = started(OPTIMIZERS["AdamW"])
        for number in range(TOTAL):
            optimizer.zero_grad()
            loss_of(model).backward()
            if fails and number in (3, 5):  # before a plain step, and before an allocation
                handle = optimizer.register_step_pre_hook(raising)
                with pytest.raises(ZeroDivisionError):
                    optimizer.step()
                handle.remove()
            optimizer.step()
        ends.append([weight.detach().clone() for layer in layers(model) for weight in (*layer.weights, layer.mask)])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def raising(*_: object) -> None:
    raise ZeroDivisionError


def test_a_masked_triplet_does_not_come_back_where_nothing_would_move_it() -> None:
    """If λ is neither rotated nor trained, it stays 0, whatever the averages: no budget is spent on it."""
    changes = {"exact_svd": False, "train_lambda": False, "init_rank": 6, "t_init": 10, "t_final": 30, "delta_t": 1}
    model, optimizer = started(lambda own: torch.optim.AdamW(own, lr=1e-3), total_steps=100, **changes)
    for _ in range(100):
        train(model, optimizer, 1)
        live = [layer.mask & (layer.lam != 0) for layer in layers(model)]
        assert sum(int(mask.sum()) for mask in live) == tunerkit.tuner(model).budget()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("exact_svd", [False, True])
def test_an_unused_part_of_a_budget_in_parameters_buys_no_dead_triplet(seed: int, exact_svd: bool) -> None:
    """An expensive triplet that does not fit leaves part of the budget unused. Later budgets must not spend it.

    They would spend it on the cheapest masked triplets, which would count with a λ near 0. So masks only shrink, and
    every live triplet is useful.
    """
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


def test_train_lambda_lets_the_optimizer_move_it() -> None:
    """As in the paper."""
    model, optimizer = started(OPTIMIZERS["AdamW"], train_lambda=True)
    train(model, optimizer, 2)
    assert not any(torch.equal(lam, torch.ones(4)) for lam in lambdas(model))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, True),
        ({"target_rank": 1}, False),
        ({"target_rank": 1, "exact_svd": False}, True),
        ({"target_rank": 1, "gamma": 0.1}, True),
        ({"start": "gaussian"}, True),
        ({"start": "gaussian", "exact_svd": True}, True),
        ({"train_lambda": True}, True),
        ({"exact_svd": False, "train_lambda": False}, False),
    ],
)
def test_it_is_trained_where_nothing_else_sets_it(config: dict[str, Any], expected: bool) -> None:
    """The default follows `exact_svd`, except for a start at Λ = 0, which would never change."""
    assert AdaLoraConfig(**config).resolved().train_lambda is expected


def test_the_named_settings_train_it() -> None:
    """In the presets of the paper and of PEFT, Λ is an ordinary parameter."""
    assert AdaLoraConfig.paper().resolved().train_lambda
    assert AdaLoraConfig.peft().resolved().train_lambda
