"""The variants of AdaLoRA that the benchmark of quality measures."""

from typing import Any

import pytest
import torch

pytest.importorskip("tunerkit_adalora", reason="the variants are AdaLoRA's")

import tunerkit
from benchmarks.quality import variants
from tunerkit_adalora import training


def adalora_net(steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A trained net of two layers with AdaLoRA on the first."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 5))
    config: dict[str, Any] = {"targets": ["0"], "init_rank": 4, "target_rank": 1, "train_modules": ["2"]}
    model = tunerkit.wrap(net, "adalora", config, seed=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tunerkit.attach(model, optimizer, total_steps=50)
    for _ in range(steps):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def loss(model: torch.nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(torch.randn(64, 20, generator=torch.Generator().manual_seed(1))).square().mean()
    return found


def hold_gradients(optimizer: torch.optim.Optimizer, *weights: torch.Tensor) -> None:
    """Put the gradients there are, and their squares, for Adam's averages."""
    for weight in weights:
        assert weight.grad is not None
        optimizer.state[weight]["exp_avg"] = weight.grad.clone()
        optimizer.state[weight]["exp_avg_sq"] = weight.grad.square()
    optimizer.zero_grad()


@pytest.mark.parametrize(("level", "power"), [(1.0, 0.0), (4.0, 0.0), (1.0, 1.0), (1.0, 0.5)])
def test_turning_keeps_what_is_added_and_makes_triplets_orthogonal(level: float, power: float) -> None:
    """The loss stays, λ is as told, P and Q have orthogonal triplets, and gradients held as averages turn along."""
    model, optimizer = adalora_net(steps=4)
    (layer,) = variants.layers_in(model)
    before = loss(model)
    before.backward()
    hold_gradients(optimizer, layer.p, layer.q)
    variants.rotate_([layer], optimizer, level=level, power=power)
    after = loss(model)
    torch.testing.assert_close(after, before)
    if power:
        sizes = torch.linalg.svdvals(layer.p @ torch.diag(layer.lam) @ layer.q)[:4] ** power
        torch.testing.assert_close(layer.lam.detach(), 4 * sizes / sizes.sum())
    else:
        assert layer.lam.tolist() == [level] * 4
    for gram in (layer.p.T @ layer.p, layer.q @ layer.q.T):
        torch.testing.assert_close(gram, torch.diag(gram.diag()), atol=1e-6, rtol=0)
    after.backward()
    for weight in (layer.p, layer.q):
        torch.testing.assert_close(optimizer.state[weight]["exp_avg"], weight.grad, atol=1e-6, rtol=1e-4)


def test_moments_may_stay_as_they_are() -> None:
    """Adam's averages turn with the triplets only if they are to."""
    model, optimizer = adalora_net(steps=4)
    (layer,) = variants.layers_in(model)
    held = optimizer.state[layer.p]["exp_avg"].clone()
    variants.rotate_([layer], optimizer, moments=False)
    assert torch.equal(optimizer.state[layer.p]["exp_avg"], held)
    variants.rotate_([layer], optimizer)
    assert not torch.equal(optimizer.state[layer.p]["exp_avg"], held)


def test_raising_keeps_what_is_added_and_gradients_held_as_averages() -> None:
    """λ becomes four times as large, the loss stays, and averages of gradients are those of the new weights."""
    model, optimizer = adalora_net(steps=4)
    (layer,) = variants.layers_in(model)
    before = loss(model)
    before.backward()
    hold_gradients(optimizer, layer.p, layer.lam)
    lam = layer.lam.detach().clone()
    variants.raise_([layer], optimizer, 4.0)
    after = loss(model)
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(layer.lam.detach(), 4 * lam)
    after.backward()
    for weight in (layer.p, layer.lam):
        assert weight.grad is not None
        torch.testing.assert_close(optimizer.state[weight]["exp_avg"], weight.grad, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(optimizer.state[weight]["exp_avg_sq"], weight.grad.square(), atol=1e-9, rtol=1e-4)


def test_lambda_rises_as_the_budget_falls() -> None:
    """From 4 triplets to 1, to about 4, but for what the optimizer adds; turned, to 4 at the last turn."""
    for rotate in (None, "before", "after"):
        with variants.changed(even=True, rotate=rotate):
            model, _ = adalora_net(steps=50)
        (layer,) = variants.layers_in(model)
        assert layer.lam[layer.mask].item() == pytest.approx(4.0, abs=1.0)


def test_q_starts_larger_or_orthonormal() -> None:
    """What is added stays 0; the first gradient of P, times the scale, stays too where Q is only larger."""
    slopes = []
    for q_scale in (1.0, 4.0):
        model, _ = adalora_net(steps=0)
        variants.restart_(model, q_scale=q_scale)
        (layer,) = variants.layers_in(model)
        loss(model).backward()
        assert layer.p.grad is not None
        slopes.append(layer.p.grad.clone())
    torch.testing.assert_close(slopes[0], slopes[1])
    length = layer.q.norm()
    variants.restart_(model, q_orthonormal=True)
    torch.testing.assert_close(layer.q @ layer.q.T, torch.eye(4) * length.square() / 4)


def test_turning_leaves_dead_triplets_alone() -> None:
    """Masked columns of P and rows of Q are what they were, and a layer without live ones is passed over."""
    model, optimizer = adalora_net(steps=4)
    (layer,) = variants.layers_in(model)
    layer.mask = torch.tensor([True, False, True, False])
    with torch.no_grad():
        layer.lam[~layer.mask] = 0.0
    p, q, before = layer.p[:, ~layer.mask].clone(), layer.q[~layer.mask].clone(), loss(model)
    variants.rotate_([layer], optimizer)
    assert torch.equal(layer.p[:, ~layer.mask], p)
    assert torch.equal(layer.q[~layer.mask], q)
    assert layer.lam.tolist() == [1, 0, 1, 0]
    torch.testing.assert_close(loss(model), before)
    layer.mask = torch.zeros(4, dtype=torch.bool)
    kept = layer.p.clone()
    variants.rotate_([layer], optimizer)
    assert torch.equal(layer.p, kept)


@pytest.mark.parametrize("score", variants.SCORES)
@pytest.mark.parametrize("rotate", [None, "before", "after"])
def test_a_variant_is_in_force_while_it_is_entered(score: str, rotate: str | None) -> None:
    """Training ends at the budget with every score, turned or not; outside nothing is changed."""
    allocate = training._allocate
    with variants.changed(score=score, rotate=rotate, per_parameter=True):
        assert training._allocate is not allocate
        model, _ = adalora_net(steps=50)
    assert training._allocate is allocate
    assert tunerkit.tuner(model).ranks() == {"0": 1}


def test_scores_of_a_triplet() -> None:
    """Its size is its singular value once it is turned; the exact one is the average at λ; without Ū it is Ī."""
    model, optimizer = adalora_net(steps=4)
    (layer,) = variants.layers_in(model)
    stacks = training.training_of(tunerkit.tuner(model)).stacks
    variants.rotate_([layer], optimizer)
    sizes = torch.linalg.svdvals(layer.p @ torch.diag(layer.lam) @ layer.q)[:4]
    torch.testing.assert_close(variants.magnitude(stacks, [layer])[0], sizes)
    means = {stack.part: stack.sensitivity[0] for stack in stacks}
    torch.testing.assert_close(variants.exact(stacks, [layer])[0], means[1])
    torch.testing.assert_close(variants.sensitivity(stacks, [layer])[0], means[1] + means[0].mean(0) + means[2].mean(1))


def test_a_factor_stretches_the_steps_of_lambda() -> None:
    """λ moves that much farther in the first step, and P and Q as far as before."""
    moved = []
    for factor in (1.0, 10.0):
        model, optimizer = adalora_net(steps=0)
        variants.scale_lambda_steps(model, optimizer, factor)
        (layer,) = variants.layers_in(model)
        with torch.no_grad():
            layer.p.add_(0.1)  # with P at 0 the gradient of λ is 0
        old = layer.lam.detach().clone()
        loss(model).backward()
        optimizer.step()
        moved.append(layer.lam.detach() - old)
    torch.testing.assert_close(moved[1], 10 * moved[0])
