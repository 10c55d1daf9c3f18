"""The variants of AdaLoRA that the quality benchmark measures."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("tunerkit_adalora", reason="the variants are AdaLoRA's")

import tunerkit
from benchmarks.quality import variants
from tunerkit_adalora import allocator, step
from tunerkit_adalora.allocator import allocate
from tunerkit_adalora.importance import Part, stacks_of
from tunerkit_adalora.svd_form import to_svd_form_
from tunerkit_adalora.training import training_of


def adalora_net(steps: int, targets: Sequence[str] = ("0",)) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A trained net of two layers with AdaLoRA on the first; the second is trained in full if it is no target."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 5))
    config: dict[str, Any] = {"targets": [*targets], "init_rank": 4, "target_rank": 1}
    config["train_modules"] = [name for name in ("2",) if name not in targets]
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
    """Store the current gradients and their squares as Adam's averages."""
    for weight in weights:
        assert weight.grad is not None
        optimizer.state[weight]["exp_avg"] = weight.grad.clone()
        optimizer.state[weight]["exp_avg_sq"] = weight.grad.square()
    optimizer.zero_grad()


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_rotating_keeps_the_update_and_makes_triplets_orthogonal(power: float) -> None:
    """The loss stays, λ is as requested, triplets are orthogonal, and gradients stored as averages are rotated too."""
    model, optimizer = adalora_net(steps=4)
    (layer,) = variants.layers_in(model)
    before = loss(model)
    before.backward()
    hold_gradients(optimizer, layer.p, layer.q)
    variants.turn_([layer], [torch.arange(4.0).flip(0)], optimizer, total=6.0, power=power)
    after = loss(model)
    torch.testing.assert_close(after, before)
    sizes = torch.linalg.svdvals(layer.p @ torch.diag(layer.lam) @ layer.q)[:4] ** power
    torch.testing.assert_close(layer.lam.detach(), 6 * sizes / sizes.sum())
    for gram in (layer.p.T @ layer.p, layer.q @ layer.q.T):
        torch.testing.assert_close(gram, torch.diag(gram.diag()), atol=1e-6, rtol=0)
    after.backward()
    for weight in (layer.p, layer.q):
        torch.testing.assert_close(optimizer.state[weight]["exp_avg"], weight.grad, atol=1e-6, rtol=1e-4)


def test_moments_may_stay_as_they_are() -> None:
    """Adam's averages are rotated with the triplets only on request."""
    model, optimizer = adalora_net(steps=4)
    (layer,) = variants.layers_in(model)
    held = optimizer.state[layer.p]["exp_avg"].clone()
    variants.turn_([layer], [torch.ones(4)], None, total=4.0)
    assert torch.equal(optimizer.state[layer.p]["exp_avg"], held)
    variants.turn_([layer], [torch.ones(4)], optimizer, total=4.0, power=0.5)
    assert not torch.equal(optimizer.state[layer.p]["exp_avg"], held)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::5])
def test_the_variant_rotates_as_the_plugin_does(order: tuple[int, ...]) -> None:
    """With λ in proportion to the singular value, triplets have the same values, positions and signs."""
    found = []
    scores = [torch.tensor(order, dtype=torch.float32)]
    for turn in (
        lambda layers: variants.turn_(layers, scores, None, total=4.0),
        lambda layers: to_svd_form_(layers, scores, total=4.0),
    ):
        model, _ = adalora_net(steps=4)
        (layer,) = variants.layers_in(model)
        turn([layer])
        found.append([weight.detach() for weight in layer.weights])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_q_starts_larger_or_orthonormal() -> None:
    """ΔW stays 0; if Q is only larger, the first gradient of P times the scale stays the same too."""
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


def test_rotating_leaves_dead_triplets_alone() -> None:
    """Masked columns of P and rows of Q are unchanged, and a layer without live triplets is skipped."""
    model, optimizer = adalora_net(steps=4)
    (layer,) = variants.layers_in(model)
    layer.mask = torch.tensor([True, False, True, False])
    with torch.no_grad():
        layer.lam[~layer.mask] = 0.0
    p, q, before = layer.p[:, ~layer.mask].clone(), layer.q[~layer.mask].clone(), loss(model)
    variants.turn_([layer], [torch.ones(4)], optimizer, total=2.0, power=0.0)
    assert torch.equal(layer.p[:, ~layer.mask], p)
    assert torch.equal(layer.q[~layer.mask], q)
    assert layer.lam.tolist() == [1, 0, 1, 0]
    torch.testing.assert_close(loss(model), before)
    layer.mask = torch.zeros(4, dtype=torch.bool)
    kept = layer.p.clone()
    variants.turn_([layer], [torch.ones(4)], optimizer, total=2.0)
    assert torch.equal(layer.p, kept)


def test_scores_and_cost_decide_where_rank_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocation gets squares of the exact scores, divided by the cost of a triplet of each layer."""
    given: dict[str, list[torch.Tensor]] = {}
    for name, score, per_parameter in (("exact", "exact", False), ("squared", "squared", True)):
        seen: list[list[torch.Tensor]] = []

        def recording(scores: Any, keep: int, seen: Any = seen, **more: Any) -> Any:
            seen.append(list(scores))
            return allocate(scores, keep, **more)

        monkeypatch.setattr(allocator, "allocate", recording)
        with variants.changed(score=score, per_parameter=per_parameter):
            adalora_net(steps=10, targets=["0", "2"])
        given[name] = seen[0]
    for one, other, cost in zip(given["exact"], given["squared"], (20 + 30 + 1, 30 + 5 + 1), strict=True):
        assert (one > 0).all()
        torch.testing.assert_close(other, one.square() / cost)


@pytest.mark.parametrize("score", variants.SCORES)
@pytest.mark.parametrize("turn", [{}, {"moments": True}, {"power": 0.5}, {"root": 0.5}])
def test_a_variant_applies_only_inside_its_context(score: str, turn: dict[str, Any]) -> None:
    """Training ends at the budget with every score and rotation; outside the context nothing is changed."""
    after_step = step.after_step
    with variants.changed(score=score, per_parameter=True, **turn):
        assert step.after_step is not after_step
        model, _ = adalora_net(steps=50)
    assert step.after_step is after_step
    assert tunerkit.tuner(model).ranks() == {"0": 1}


def test_each_way_of_rotating_has_an_effect() -> None:
    """Another power of the singular value, or rotating Adam's averages too, gives different weights."""
    ends = []
    for turn in ({}, {"power": 0.0}, {"moments": True}):
        with variants.changed(**turn):
            model, _ = adalora_net(steps=50)
        ends.append(variants.layers_in(model)[0].p.detach())
    assert not torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_lambda_adds_up_to_less_where_fewer_triplets_are_left() -> None:
    """Of 4 triplets 1 is left: λ adds up to 4 · (1/4)^½."""
    with variants.changed(root=0.5):
        model, _ = adalora_net(steps=50)
    (layer,) = variants.layers_in(model)
    assert layer.lam.sum().item() == pytest.approx(2.0)
    model, _ = adalora_net(steps=50)
    assert variants.layers_in(model)[0].lam.sum().item() == pytest.approx(4.0)


def test_scores_of_a_triplet() -> None:
    """The size is the singular value after rotation; the exact score is the average at λ; without Ū the score is Ī."""
    model, optimizer = adalora_net(steps=4)
    (layer,) = variants.layers_in(model)
    stacks = stacks_of(training_of(tunerkit.tuner(model)).running)
    variants.turn_([layer], [torch.arange(4.0).flip(0)], optimizer, total=4.0)
    sizes = torch.linalg.svdvals(layer.p @ torch.diag(layer.lam) @ layer.q)[:4]
    torch.testing.assert_close(variants.magnitude(stacks, [layer])[0], sizes)
    means = {stack.part: stack.sensitivity[0] for stack in stacks}
    torch.testing.assert_close(variants.exact(stacks, [layer])[0], means[Part.LAM])
    torch.testing.assert_close(
        variants.sensitivity(stacks, [layer])[0], means[Part.LAM] + means[Part.P].mean(0) + means[Part.Q].mean(1)
    )


def test_a_factor_stretches_the_steps_of_lambda() -> None:
    """In the first step λ changes that many times as much, P and Q as much as before."""
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
