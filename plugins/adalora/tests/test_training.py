"""AdaLoRA's work around an optimizer step: regulariser, masks, budget."""

import copy
import itertools
import math
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import tunerkit
from plugins.adalora.tests.short_training import (
    KINDS,
    TOTAL,
    adamw,
    attached,
    layers,
    live,
    masked_lambdas,
    resumed,
    trained,
    weights,
    wrapped,
)
from tests.support.model_checks import silent
from tunerkit.errors import AdapterError, ConfigError, FileError, StepError, TunerkitWarning
from tunerkit_adalora.allocator import allocate
from tunerkit_adalora.importance import stacks_of, triplet_scores
from tunerkit_adalora.orthogonality import penalty
from tunerkit_adalora.schedule import plan
from tunerkit_adalora.training import training_of
from tunerkit_testing.small import loss_of, net, step, train, trainable

# --- The regulariser --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["reference", "paper"])
def test_the_loss_never_contains_the_regulariser(form: str) -> None:
    """With the same weights the loss is bit-identical for γ = 0 and γ = 1, in training, evaluation or disabled."""
    without, with_it = (wrapped(gamma=gamma, orthogonality=form, start="gaussian") for gamma in (0.0, 1.0))
    train(with_it, attached(with_it), 3)
    without.load_state_dict(with_it.state_dict())
    for mode in (True, False):
        assert torch.equal(loss_of(without.train(mode)), loss_of(with_it.train(mode)))
    with tunerkit.disabled(without), tunerkit.disabled(with_it):
        assert torch.equal(loss_of(without), loss_of(with_it))


@pytest.mark.parametrize("micro_batches", [1, 5])
@pytest.mark.parametrize("form", ["reference", "paper"])
def test_accumulation_does_not_multiply_the_regulariser(form: str, micro_batches: int) -> None:
    """The step uses the accumulated task gradient plus γ·∂R once; autograd computes the expected ∂R."""
    gamma = 0.7
    model = wrapped(gamma=gamma, orthogonality=form, start="gaussian")
    optimizer = attached(model)
    for _ in range(micro_batches):
        loss_of(model).backward()
    pairs = [(layer.p, layer.q) for layer in layers(model)]
    matrices = [matrix for pair in pairs for matrix in pair]
    task, lambdas = (
        [own.grad.clone() for own in weights if own.grad is not None]
        for weights in (matrices, [layer.lam for layer in layers(model)])
    )
    slopes = torch.autograd.grad(gamma * penalty(pairs, form=form), matrices)  # type: ignore[arg-type]
    optimizer.step()
    for matrix, own, slope in zip(matrices, task, slopes, strict=True):
        torch.testing.assert_close(matrix.grad, own + slope)
        assert slope.abs().max() > 0
    for layer, own in zip(layers(model), lambdas, strict=True):
        assert layer.lam.grad is not None
        assert torch.equal(layer.lam.grad, own)


def test_clipping_does_not_see_the_regulariser() -> None:
    """The norm is that of the loss's gradient, which is clipped alone. The regulariser is added in full."""
    clipped = []
    for gamma in (0.0, 1.0):
        model = wrapped(gamma=gamma, start="gaussian")
        optimizer = attached(model)
        loss_of(model).backward()
        norm = nn.utils.clip_grad_norm_(trainable(model), 1e-5)
        optimizer.step()
        clipped.append((norm, nn.utils.get_total_norm([p.grad for p in trainable(model) if p.grad is not None])))
    assert clipped[0][0] == clipped[1][0] > 4e-5
    assert clipped[0][1] < 1.1e-5 < 0.01 < clipped[1][1]


@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled before"])
@pytest.mark.parametrize("kind", KINDS)
def test_under_a_grad_scaler_the_regulariser_is_as_without(kind: str, unscale: bool) -> None:
    """Scaled gradients get a scaled regulariser: three steps give the same weights as three unscaled steps."""
    ends = []
    for enabled in (False, True):
        model = wrapped(gamma=0.5, start="gaussian")
        optimizer = torch.optim.SGD(trainable(model), lr=0.1, **KINDS[kind])
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
        tunerkit.attach(model, optimizer, total_steps=TOTAL)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(loss_of(model)).backward()  # type: ignore[no-untyped-call]
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        ends.append(weights(model))
    for own, other in zip(*ends, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


# --- Masks and budget -------------------------------------------------------------------------------------------------

# Parameters of one triplet at each target of `net`: out + in + 1.
COSTS = (8 + 6 + 1, 7 + 8 + 1, 3 + 7 + 1)


@st.composite
def runs(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A config and a total that leave part of the budget to allocate, in triplets or in parameters."""
    total = draw(st.integers(6, 14))
    t_init = draw(st.integers(0, total - 1))
    t_final = draw(st.integers(0, total - t_init - 1))
    init_rank = draw(st.integers(1, 5))
    config: dict[str, Any] = {
        "init_rank": init_rank, "target_rank": None, "t_init": t_init, "t_final": t_final,
        "delta_t": draw(st.integers(1, 4)), "start": draw(st.sampled_from(["lora", "gaussian", "orthonormal"])),
    }  # fmt: skip
    kind = draw(st.sampled_from(["average", "average in parameters", "rank", "parameters"]))
    if kind.startswith("average"):
        config["target_rank"] = draw(st.integers(1, init_rank))
        config["budget_unit"] = "parameters" if kind.endswith("parameters") else "rank"
    elif kind == "rank":
        config["budget"] = draw(st.integers(1, 3 * init_rank))
    else:
        config["budget_unit"] = "parameters"
        config["budget"] = draw(st.integers(min(COSTS), init_rank * sum(COSTS)))
    return config, total


@given(run=runs(), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_masks_count_the_budget_in_force_at_every_step(run: tuple[dict[str, Any], int], seed: int) -> None:
    """For any schedule, size and unit: after each step the masks cost exactly the scheduled budget.

    In parameters they cost at most that, and the gap is smaller than the most expensive triplet. Masked λ are 0 right
    after an allocation and from the final phase on. The history has each allocation.
    """
    config, total = run
    model = wrapped(seed=seed, **config)
    tuner = tunerkit.tuner(model)
    optimizer = attached(model, total)
    in_parameters = config.get("budget_unit") == "parameters"
    costs = COSTS if in_parameters else (1, 1, 1)
    previous = sum(cost * config["init_rank"] for cost in costs)
    target = config.get("budget") or sum(costs) * config["target_rank"]
    assert tuner.budget(0) == previous
    final_step = total - config["t_final"]
    for number in range(1, total + 1):
        allocations = len(tuner.history)
        step(model, optimizer)
        budget = tuner.budget(number)
        assert budget == tuner.budget() <= previous
        previous = budget
        spent = sum(cost * rank for cost, rank in zip(costs, tuner.ranks().values(), strict=True))
        assert budget - max(COSTS) < spent <= budget if in_parameters else spent == budget
        if number >= final_step or len(tuner.history) > allocations:
            assert not masked_lambdas(model).any()
        if len(tuner.history) > allocations:
            assert (tuner.history[-1].budget, dict(tuner.history[-1].ranks)) == (budget, tuner.ranks())
    assert previous == target
    due = [t for t in range(1, final_step) if t > config["t_init"] and t % config["delta_t"] == 0]
    assert [change.step for change in tuner.history] == [*due, final_step]


@pytest.mark.parametrize("gradient", [1.0, 0.0], ids=["ties", "zero gradients"])
@pytest.mark.parametrize("unit", ["rank", "parameters"])
def test_the_budget_is_exact_whatever_the_scores(gradient: float, unit: str) -> None:
    """With equal scores or all 0, the budget is exact, and ties go to the first targets and indices."""
    budget = 7 if unit == "rank" else 4 * COSTS[0] + 2 * COSTS[1] + 1
    model = wrapped(target_rank=None, budget=budget, budget_unit=unit, exact_svd=False)
    for parameter in trainable(model):
        nn.init.constant_(parameter, 0.5)
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    tunerkit.attach(model, optimizer, total_steps=TOTAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TunerkitWarning)
        step_with(model, optimizer, gradient)
    first, second, third = (layer.mask.tolist() for layer in layers(model))
    assert first == [True] * 4
    assert second == ([True] * 3 + [False] if unit == "rank" else [True] * 2 + [False] * 2)
    assert third == [False] * 4


def step_with(model: nn.Module, optimizer: torch.optim.Optimizer, gradient: float | None) -> None:
    """Step with the same gradient everywhere, or with none, until something raises or training ends."""
    for _ in range(TOTAL):
        for parameter in trainable(model):
            parameter.grad = None if gradient is None else torch.full_like(parameter, gradient)
        optimizer.step()


ALLOCATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ranks": ({}, {"keep": 6}),
    "parameters": (
        {"target_rank": None, "budget": 70, "budget_unit": "parameters"},
        {"keep": 70, "costs": COSTS},
    ),
    "bounds": (
        {"min_rank": {"4": 2}, "max_rank": {"0": 1, "2": 3}},
        {"keep": 6, "minimum": [0, 0, 2], "maximum": [1, 3, 4]},
    ),
}


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_an_allocation_is_by_the_scores_of_the_averages(name: str) -> None:
    """With the config's costs and bounds, whatever the start of training favoured."""
    changes, arguments = ALLOCATIONS[name]
    for seed in range(8):
        model = wrapped(seed=seed, **changes, t_init=0, t_final=2, delta_t=99)
        optimizer = attached(model, 6)
        train(model, optimizer, 3)
        expected = allocate(triplet_scores(stacks_of(training_of(tunerkit.tuner(model)).running)), **arguments)
        step(model, optimizer)
        assert all(torch.equal(layer.mask, mask) for layer, mask in zip(layers(model), expected, strict=True))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_scores_do_not_underflow_in_any_adapter_dtype(dtype: str) -> None:
    """Importance is averaged in fp32 or wider: with tiny fp16 gradients, scores still rank triplets.

    The gradients of every second triplet are a hundred times smaller. In fp16, their products would all be 0.
    """
    model = wrapped(adapter_dtype=dtype)
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    tunerkit.attach(model, optimizer, total_steps=TOTAL)
    for number in range(TOTAL):
        for layer in layers(model):
            size = torch.tensor([1e-6, 1e-4, 1e-6, 1e-4]) * (1 + number % 3)
            for weight in layer.weights:
                shaped = size[:, None] if weight is layer.q else size
                weight.grad = shaped.expand_as(weight).to(weight.dtype).clone()
        optimizer.step()
    assert all(layer.lam.dtype == getattr(torch, dtype) for layer in layers(model))
    assert all(layer.mask.tolist() == [False, True, False, True] for layer in layers(model))


def test_a_masked_lambda_moves_freely_until_the_next_allocation_and_may_come_back() -> None:
    """The mask zeroes λ only at an allocation; gradients may raise it again, and with it the score."""
    model = wrapped(t_init=1, delta_t=2, t_final=2, beta1=0.3, beta2=0.3, train_lambda=True)
    tuner = tunerkit.tuner(model)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    tunerkit.attach(model, optimizer, total_steps=12)

    def push(favoured: int, steps: int) -> None:
        """Give triplets with index % 2 == ``favoured`` large gradients that grow from step to step."""
        for _ in range(steps):
            for layer in layers(model):
                size = torch.where(torch.arange(4) % 2 == favoured, 1.0 + tuner.steps, 1e-4)
                layer.lam.grad = -size
                layer.p.grad, layer.q.grad = -size.expand_as(layer.p).clone(), -size[:, None].expand_as(layer.q).clone()
            optimizer.step()

    push(0, steps=6)
    dead = [~layer.mask for layer in layers(model)]
    assert any(mask.any() for mask in dead)
    assert not masked_lambdas(model).any()
    push(1, steps=1)
    # Step 7 allocates nothing: what is masked has moved, and counts for the forward.
    assert (masked_lambdas(model) != 0).all()
    push(1, steps=3)
    assert any((layer.mask & was_dead).any() for layer, was_dead in zip(layers(model), dead, strict=True))
    assert live(model) == tuner.budget() == 6
    push(1, steps=1)
    assert not masked_lambdas(model).any()


def test_in_the_final_phase_the_mask_holds_after_every_step() -> None:
    """Ranks stay as the final allocation set them; dead λ are 0 after each step, live ones keep training."""
    model = wrapped(train_lambda=True)
    optimizer = attached(model)
    train(model, optimizer, 14)
    masks = [layer.mask.clone() for layer in layers(model)]
    for _ in range(6):
        before = [layer.lam.detach().clone() for layer in layers(model)]
        step(model, optimizer)
        assert not masked_lambdas(model).any()
        for layer, mask, old in zip(layers(model), masks, before, strict=True):
            assert torch.equal(layer.mask, mask)
            assert (layer.lam[mask] != old[mask]).all()
    assert masked_lambdas(model).numel() == 6


@pytest.mark.parametrize(
    ("bounds", "least", "most"),
    [
        ({"min_rank": 1}, (1, 1, 1), (4, 4, 4)),
        ({"max_rank": 3}, (0, 0, 0), (3, 3, 3)),
        ({"min_rank": 2, "max_rank": 2}, (2, 2, 2), (2, 2, 2)),
        ({"min_rank": {"0": 1, "2": 4}, "max_rank": {"0": 1}}, (1, 4, 0), (1, 4, 4)),
        ({"max_rank": {"2": 0}}, (0, 0, 0), (4, 0, 4)),
    ],
)
def test_minimum_and_maximum_ranks_hold_at_the_end(
    bounds: dict[str, Any], least: tuple[int, ...], most: tuple[int, ...]
) -> None:
    """Set for all targets or by target, they bound the final ranks, and the budget is still exact."""
    for favoured in range(3):
        model = wrapped(start="gaussian", **bounds)
        nn.init.constant_(layers(model)[favoured].lam, 5.0)  # without bounds this one would take all it can
        train(model, attached(model), TOTAL)
        ranks = tuple(tunerkit.tuner(model).ranks().values())
        assert all(low <= rank <= high for low, rank, high in zip(least, ranks, most, strict=True)), ranks
        assert sum(ranks) == 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"min_rank": 3}, r"minimum ranks need 9, but the final budget is 6.*@ \$\.min_rank"),
        ({"max_rank": 1}, r"maximum ranks admit 3, but the final budget is 6.*@ \$\.max_rank"),
        ({"min_rank": {"2": 3}, "max_rank": 2}, r"minimum 3 is above maximum 2 at 2 @ \$\.min_rank"),
        ({"min_rank": {"2": 5}}, "minimum 5 is above maximum 4 at 2"),
        ({"min_rank": {"2": 5}, "max_rank": 9}, "minimum 5 is above maximum 4 at 2"),
        (
            {"target_rank": None, "budget": min(COSTS) - 1, "budget_unit": "parameters"},
            rf"a budget of 10 parameters buys no triplet: the cheapest costs {min(COSTS)}; raise it @ \$\.budget",
        ),
    ],
)
def test_bounds_that_the_budget_cannot_meet_are_refused_when_attaching(changes: dict[str, Any], words: str) -> None:
    """The message has the numbers and the target; nothing is attached."""
    model = wrapped(**changes)
    with pytest.raises(ConfigError, match=words):
        attached(model)
    assert tunerkit.tuner(model).state is None


@pytest.mark.parametrize(
    "changes",
    [
        {"min_rank": 2, "max_rank": 2},
        {"target_rank": None, "budget": min(COSTS), "budget_unit": "parameters", "max_rank": 1},
    ],
)
def test_bounds_that_the_budget_just_meets_are_accepted(changes: dict[str, Any]) -> None:
    """In parameters a maximum need not admit the whole budget, which may be too small for another triplet."""
    attached(wrapped(**changes))


# --- Gradients that are not there, or no numbers ----------------------------------------------------------------------


class Skipping(nn.Module):
    """Three layers, of which the middle one runs in each ``every``-th forward, or never."""

    def __init__(self, every: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.every, self.calls = every, 0

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        self.calls += 1
        result: Tensor = self.last(torch.tanh(self.middle(h)) if self.every and self.calls % self.every == 0 else h)
        return result


@pytest.mark.filterwarnings("ignore:these adapters never ran")  # core tells it, rightly
@pytest.mark.parametrize("gamma", [0.0, 0.1], ids=["plain", "regulariser"])
@pytest.mark.parametrize("frozen", [False, True], ids=["unused", "frozen"])
def test_a_layer_without_gradient_is_pruned_first(frozen: bool, gamma: float) -> None:
    """A layer that forward doesn't use, or that is frozen, has no importance; the budget is exact."""
    model = wrapped(Skipping(every=int(frozen)), targets=["first", "middle", "last"], gamma=gamma)
    layers(model)[1].requires_grad_(not frozen)
    train(model, attached(model), TOTAL)
    ranks = tunerkit.tuner(model).ranks()
    assert sum(ranks.values()) == 6
    assert ranks["middle"] == 0


@pytest.mark.filterwarnings("ignore:these adapters never ran")  # core tells it, rightly
@pytest.mark.parametrize("exact_svd", [False, True], ids=["plain", "SVD form"])
def test_a_layer_that_is_dropped_now_and_then_keeps_its_averages_meanwhile(exact_svd: bool) -> None:
    """A step without its gradient doesn't change a layer's averages; the budget is exact."""
    model = wrapped(Skipping(every=2), targets=["first", "middle", "last"], exact_svd=exact_svd)
    optimizer = attached(model)
    train(model, optimizer, 2)  # at the first steps P = 0, and so are other gradients
    for number in range(2, 13):
        before = [average.clone() for average in training_of(tunerkit.tuner(model)).averages[0]]
        step(model, optimizer)
        after = training_of(tunerkit.tuner(model)).averages[0]
        kept = [torch.equal(one, other) for one, other in zip(after, before, strict=True)]
        assert kept == [*[False] * 3, *[number % 2 == 0] * 3, *[False] * 3]
    train(model, optimizer, TOTAL - 13)
    assert live(model) == 6


@pytest.mark.parametrize("frozen", ["p", "lam", "q"])
def test_a_frozen_weight_has_no_importance_and_stays(frozen: str) -> None:
    """If one of a layer's three weights is frozen, the rest trains and the budget is exact."""
    model = wrapped(gamma=0.1)
    weight = layers(model)[0].get_parameter(frozen).requires_grad_(False)
    before = weight.detach().clone()
    optimizer = attached(model)
    train(model, optimizer, 5)
    assert torch.equal(weight, before)
    train(model, optimizer, 15)
    assert live(model) == 6


@pytest.mark.parametrize("exact_svd", [False, True], ids=["plain", "SVD form"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_gradients_that_are_not_finite_are_left_out_and_reported(value: float, exact_svd: bool) -> None:
    """One bad step: averages stay finite, the next allocation warns with the count, and pruning stays exact."""
    model = wrapped(exact_svd=exact_svd)
    for layer in layers(model):
        nn.init.normal_(layer.p)  # at rest, P = 0 would leave every score at 0
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)  # the weights themselves stay finite
    tunerkit.attach(model, optimizer, total_steps=TOTAL)
    train(model, optimizer, 4)
    kept = [p.detach().clone() for p in trainable(model)]
    optimizer.zero_grad()
    loss_of(model).backward()
    for layer in layers(model)[:2]:
        assert layer.q.grad is not None
        layer.q.grad[0, 0] = value
    optimizer.step()
    for parameter, old in zip(trainable(model), kept, strict=True):
        parameter.data.copy_(old)  # a rate of 0 times infinity is NaN
    with pytest.warns(TunerkitWarning, match=r"\b2 of 54 gradients were not finite"):
        train(model, optimizer, 1)
    assert all(bool(t.isfinite().all()) for t in itertools.chain(*training_of(tunerkit.tuner(model)).averages))
    with silent(Warning):
        train(model, optimizer, TOTAL - 6)
    assert live(model) == 6


@pytest.mark.parametrize(
    ("value", "good", "words"),
    [
        (math.nan, 6, r"no usable gradient in the 3 steps.* all 27 were NaN or infinite"),
        (math.inf, 6, r"no usable gradient in the 3 steps.* all 27 were NaN or infinite"),
        (None, 0, r"no usable gradient in the 6 steps.*use_reentrant"),
    ],
    ids=["NaN", "infinite", "none"],
)
def test_no_usable_gradient_since_the_last_allocation_is_an_error(value: float | None, good: int, words: str) -> None:
    """Without scores, or with those of a run that diverged, pruning would go by position: the masks stay."""
    model = wrapped()
    optimizer = attached(model)
    train(model, optimizer, good)
    masks = [layer.mask.clone() for layer in layers(model)]
    with pytest.raises(StepError, match=words):
        step_with(model, optimizer, value)
    assert tunerkit.tuner(model).steps == (9 if good else 6)
    assert all(torch.equal(layer.mask, mask) for layer, mask in zip(layers(model), masks, strict=True))


def test_an_allocation_right_after_another_triggers_no_warning() -> None:
    """At T - t_f averaging stops, so it is expected that no step was averaged since the previous allocation."""
    model = wrapped(t_init=0, t_final=3, delta_t=2)
    with silent():
        train(model, attached(model, 8), 8)
    assert [change.step for change in tunerkit.tuner(model).history] == [2, 4, 5]


@pytest.mark.parametrize("first", [1, 15], ids=["final phase from the first step on", "no part in any step before it"])
def test_without_an_average_the_next_step_makes_the_scores(first: int) -> None:
    """With scores of 0, pruning would go by position. Here the earliest layer has no importance and is pruned.

    Step numbers may jump under a Trainer's clock, for an inactive adapter, or if steps were skipped.
    """
    model = wrapped(t_init=0, t_final=TOTAL - 1 if first == 1 else 6)
    for parameter in layers(model)[0].parameters():
        parameter.register_hook(torch.zeros_like)
    clock = itertools.count(first)
    optimizer = adamw(model)
    tunerkit.steps.drive([tunerkit.tuner(model)], optimizer, total_steps=TOTAL, clock=lambda: next(clock))
    train(model, optimizer, 1)
    assert live(model) == 6
    assert layers(model)[0].rank == 0


def test_an_allocation_by_scores_of_zero_triggers_a_warning() -> None:
    """Gradients too small for fp32, or left out, give scores of 0: positions decide the allocation."""
    model = wrapped()
    optimizer = attached(model)
    for _ in range(5):
        step(model, optimizer, lambda model: 1e-30 * loss_of(model))
    with pytest.warns(TunerkitWarning, match="every score is 0"):
        step(model, optimizer, lambda model: 1e-30 * loss_of(model))
    assert live(model) == tunerkit.tuner(model).budget()


# --- Before the first step, after the last, and once more -------------------------------------------------------------


def test_finish_makes_the_final_allocation_early(tmp_path: Path) -> None:
    """After 5 of 20 steps it prunes to the final budget with one history entry. A second call does nothing.

    Saving before it warns of a budget above the final one.
    """
    model = wrapped()
    tuner = tunerkit.tuner(model)
    optimizer = attached(model)
    train(model, optimizer, 5)
    assert live(model) == 12
    with pytest.warns(TunerkitWarning, match="above the final"):
        tunerkit.save(model, tmp_path)
    tuner.finish()
    assert live(model) == tuner.budget() == 6
    assert [(change.step, change.budget) for change in tuner.history] == [(5, 6)]
    masks = [layer.mask.clone() for layer in layers(model)]
    for _ in range(15):
        step(model, optimizer)
        assert not masked_lambdas(model).any()
    with silent():
        tunerkit.save(model, tmp_path)
    tuner.finish()
    assert all(torch.equal(layer.mask, mask) for layer, mask in zip(layers(model), masks, strict=True))
    assert len(tuner.history) == 1


def test_without_a_step_there_is_nothing_to_finish_or_save(tmp_path: Path) -> None:
    """All scores are 0: the error says what was forgotten, and no file is written."""
    model = wrapped()
    with pytest.raises(StepError, match=r"tunerkit\.attach"):
        tunerkit.tuner(model).finish()
    with pytest.raises(AdapterError, match=r"tunerkit\.attach"):
        tunerkit.save(model, tmp_path / "none")
    attached(model)
    with pytest.raises(StepError, match="no step was taken yet"):
        tunerkit.tuner(model).finish()
    with pytest.raises(AdapterError, match="0 steps"):
        tunerkit.save(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_budget_of_a_step_before_attaching_and_after_loading(tmp_path: Path) -> None:
    """With total_steps in the config or the file, the schedule is known at once; else the error says what to do."""
    model = wrapped(total_steps=TOTAL)
    schedule = plan(total_steps=TOTAL, t_init=4, t_final=6, delta_t=3, initial=12, target=6)

    def check(tuner: Any, now: int) -> None:
        assert [tuner.budget(number) for number in range(23)] == [schedule.budget(number) for number in range(23)]
        assert tuner.budget() == now

    check(tunerkit.tuner(model), 12)
    optimizer = adamw(model)
    tunerkit.attach(model, optimizer)
    train(model, optimizer, TOTAL)
    check(tunerkit.tuner(model), 6)
    check(tunerkit.tuner(tunerkit.load(net(), tunerkit.save(model, tmp_path))), 6)
    with pytest.raises(StepError, match="total_steps"):
        tunerkit.tuner(wrapped()).budget(3)


@pytest.mark.parametrize("exact_svd", [False, True], ids=["plain", "SVD form"])
def test_attaching_a_loaded_adapter_begins_a_new_training_with_all_triplets(exact_svd: bool, tmp_path: Path) -> None:
    """Training a pruned adapter again starts from b(0), and prunes again."""
    loaded = tunerkit.load(net(), tunerkit.save(trained(exact_svd=exact_svd), tmp_path), trainable=True)
    assert live(loaded) == 6
    optimizer = attached(loaded, 10 + 1)
    assert live(loaded) == tunerkit.tuner(loaded).budget() == 6  # until the first step it can be saved as it is
    step(loaded, optimizer)
    assert live(loaded) == tunerkit.tuner(loaded).budget() == 12
    train(loaded, optimizer, 10)
    assert live(loaded) == 6


@pytest.mark.parametrize("total", [1, 2, 3, 4, 5])
def test_a_training_too_short_to_choose_what_to_prune_is_refused(total: int) -> None:
    """Scores of so few gradients say nothing. Six steps are enough, and without pruning any number is."""
    spans: dict[str, Any] = {"t_init": 0.1, "t_final": 0.3, "delta_t": 10}
    model, fixed = wrapped(**spans), wrapped(**spans, init_rank=2, exact_svd=False)
    with pytest.raises(ConfigError, match=rf"at least 6 steps, got {total}.*@ \$\.total_steps"):
        attached(model, total)
    attached(model, 6)
    attached(fixed, total)


@pytest.mark.parametrize("spans", [{}, {"t_init": 0.1, "t_final": 0.3}], ids=["steps", "shares"])
@pytest.mark.parametrize("shrink", [True, False], ids=["shrunk", "masked"])
def test_a_finished_adapter_trains_a_few_steps_more(shrink: bool, spans: dict[str, Any], tmp_path: Path) -> None:
    """Nothing is left to prune, so any number of steps will do, and the ranks stay; it can be resumed too."""
    model = trained(shrink=shrink, **spans)
    ranks, file = tunerkit.tuner(model).ranks(), tunerkit.save(model, tmp_path / "finished")
    for total in (1, 2, 5):
        more = tunerkit.load(net(), file, trainable=True)
        before, optimizer = weights(more), attached(more, total)
        with pytest.warns(TunerkitWarning, match="is left to prune") if shrink else nullcontext():
            train(more, optimizer, total)
        assert not torch.equal(weights(more)[0], before[0])
        again, _ = resumed(more, optimizer, tmp_path / "more")
        assert torch.equal(loss_of(again), loss_of(more))
        for tuner in (tunerkit.tuner(more), tunerkit.tuner(again)):
            assert (tuner.ranks(), tuner.budget(), sum(ranks.values())) == (ranks, 6, 6)


@pytest.mark.filterwarnings("ignore:.*above the final 6")
@pytest.mark.parametrize("shrink", [True, False], ids=["shrunk", "masked"])
def test_weights_of_mid_training_in_a_finished_adapter_are_not_saved(shrink: bool, tmp_path: Path) -> None:
    """The file would have 12 triplets after a budget of 6. With the state of that step, it is that training."""
    model = wrapped(shrink=shrink)
    optimizer = attached(model)
    train(model, optimizer, 4)
    middle = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, TOTAL - 4)
    file = tunerkit.save(model, tmp_path)
    finished, data = copy.deepcopy(model.state_dict()), file.read_bytes()
    model.load_state_dict(middle[0])
    words = r"keep 12, .* set a budget of 6: .*optimizer's state_dict.* of step 20 again"
    with pytest.raises(AdapterError, match=words):
        tunerkit.save(model, tmp_path)
    assert file.read_bytes() == data
    model.load_state_dict(finished)
    tunerkit.save(model, tmp_path)
    assert file.read_bytes() == data
    model.load_state_dict(middle[0])
    optimizer.load_state_dict(middle[1])
    tunerkit.save(model, tmp_path)
    assert live(tunerkit.load(net(), tmp_path)) == 12


def test_a_state_of_mid_training_in_a_finished_adapter_is_refused(tmp_path: Path) -> None:
    """Its masks would revive what is pruned, with λ at 0. Nothing changes."""
    model = wrapped()
    optimizer = attached(model)
    train(model, optimizer, 4)
    state = tunerkit.save_state(model, tmp_path)
    train(model, optimizer, TOTAL - 4)
    before = weights(model)
    words = "the masks keep 6 triplets that are pruned in the adapter, whose weights are of"
    with pytest.raises(FileError, match=words):
        tunerkit.load_state(model, state)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))
    assert tunerkit.tuner(model).steps == TOTAL
