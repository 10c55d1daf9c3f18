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
from plugins.adalora.tests.short_training import TOTAL, adamw, attached, layers, live, masked_lambdas, weights, wrapped
from tunerkit.errors import AdapterError, FileError
from tunerkit_adalora.orthogonality import penalty
from tunerkit_adalora.schedule import plan
from tunerkit_adalora.training import training_of
from tunerkit_testing.small import loss_of, net, step, train, trainable

# --- The regulariser --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["reference", "paper"])
def test_the_loss_never_contains_the_regulariser(form: str) -> None:
    """With the same weights the loss is bit-identical for γ = 0 and γ = 1, in training, evaluation or disabled."""
    without, with_it = (wrapped(gamma=gamma, orthogonality=form, start="gaussian") for gamma in (0.0, 1.0))
    optimizers = [attached(model) for model in (without, with_it)]
    for _ in range(3):
        step(with_it, optimizers[1])
    without.load_state_dict(with_it.state_dict())
    for mode in (True, False):
        assert torch.equal(loss_of(without.train(mode)), loss_of(with_it.train(mode)))
    with tunerkit.disabled(without), tunerkit.disabled(with_it):
        assert torch.equal(loss_of(without), loss_of(with_it))
    for model, optimizer in zip((without, with_it), optimizers, strict=True):
        step(model, optimizer)
    # The regulariser does act: through the gradient.
    assert not torch.equal(layers(without)[0].p, layers(with_it)[0].p)


@pytest.mark.parametrize("micro_batches", [1, 2, 5])
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
    task = [matrix.grad.clone() for matrix in matrices if matrix.grad is not None]
    slopes = torch.autograd.grad(gamma * penalty(pairs, form=form), matrices)  # type: ignore[arg-type]
    lambdas = [layer.lam.grad.clone() for layer in layers(model) if layer.lam.grad is not None]
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


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("kind", ["foreach", "fused", "loop"])
def test_under_a_grad_scaler_the_regulariser_is_as_without(kind: str, unscale: bool) -> None:
    """Scaled gradients get a scaled regulariser: three steps give the same weights as three unscaled steps."""
    options = {"foreach": {"foreach": True}, "fused": {"fused": True}, "loop": {"foreach": False}}[kind]
    ends = []
    for enabled in (False, True):
        model = wrapped(gamma=0.5, start="gaussian")
        optimizer = torch.optim.SGD(trainable(model), lr=0.1, **options)
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


# Parameters of one triplet at each target of `net`: out + in + 1.
COSTS = (8 + 6 + 1, 7 + 8 + 1, 3 + 7 + 1)


@given(run=runs(), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_masks_count_the_budget_in_force_at_every_step(run: tuple[dict[str, Any], int], seed: int) -> None:
    """For any schedule, size and unit: after each step the masks cost exactly the scheduled budget.

    In parameters they cost at most that, and the gap is smaller than the most expensive triplet. A further triplet of
    the cheapest target fits only if a more expensive one is before it in the ranking. Masked λ are 0 right after an
    allocation and from the final phase on.
    """
    config, total = run
    model = wrapped(seed=seed, **config)
    tuner = tunerkit.tuner(model)
    optimizer = attached(model, total)
    in_parameters = config.get("budget_unit") == "parameters"
    costs = COSTS if in_parameters else (1, 1, 1)
    initial = sum(cost * config["init_rank"] for cost in costs)
    target = config.get("budget") or sum(costs) * config["target_rank"]
    assert tuner.budget(0) == initial
    final_step = total - config["t_final"]
    previous = initial
    for number in range(1, total + 1):
        allocations = len(tuner.history)
        step(model, optimizer)
        budget = tuner.budget(number)
        assert budget == tuner.budget() <= previous
        previous = budget
        spent = sum(cost * rank for cost, rank in zip(costs, tuner.ranks().values(), strict=True))
        if in_parameters:
            assert budget - max(COSTS) < spent <= budget
        else:
            assert spent == budget
        if number >= final_step or len(tuner.history) > allocations:
            assert not masked_lambdas(model).any()
    assert previous == target
    assert [change.step for change in tuner.history] == [
        number for number in range(1, final_step + 1) if allocates(config, number, final_step)
    ]


def allocates(config: dict[str, Any], number: int, final_step: int) -> bool:
    return number == final_step or (number > config["t_init"] and number % config["delta_t"] == 0)


@pytest.mark.parametrize("case", ["ties", "zero gradients"])
@pytest.mark.parametrize("unit", ["rank", "parameters"])
def test_the_budget_is_exact_whatever_the_scores(case: str, unit: str) -> None:
    """With equal scores or all 0, the budget is exact, and ties go to the first targets and indices."""
    budget = 7 if unit == "rank" else 4 * COSTS[0] + 2 * COSTS[1] + 1
    model = wrapped(target_rank=None, budget=budget, budget_unit=unit, exact_svd=False)
    with torch.no_grad():
        for layer in layers(model):
            for weight in (layer.p, layer.lam, layer.q):
                weight.fill_(0.5)
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    tunerkit.attach(model, optimizer, total_steps=TOTAL)
    for _ in range(TOTAL):
        for parameter in trainable(model):
            parameter.grad = torch.full_like(parameter, {"ties": 1.0, "zero gradients": 0.0}[case])
        optimizer.step()
    first, second, third = ([bool(m) for m in layer.mask] for layer in layers(model))
    assert first == [True] * 4
    assert second == ([True] * 3 + [False] if unit == "rank" else [True] * 2 + [False] * 2)
    assert third == [False] * 4


def test_a_masked_lambda_moves_freely_until_the_next_allocation_and_may_come_back() -> None:
    """The mask zeroes λ only at an allocation; gradients may raise it again, and with it the score."""
    model = wrapped(t_init=1, delta_t=2, t_final=2, beta1=0.3, beta2=0.3, train_lambda=True)
    tuner = tunerkit.tuner(model)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    tunerkit.attach(model, optimizer, total_steps=12)

    def push(favoured: int) -> None:
        """Give triplets with index % 2 == ``favoured`` large gradients that grow from step to step."""
        for layer in layers(model):
            index = torch.arange(len(layer.lam))
            size = torch.where(index % 2 == favoured, 1.0 + tuner.steps, 1e-4)
            layer.lam.grad = -size
            layer.p.grad, layer.q.grad = -size.expand_as(layer.p).clone(), -size[:, None].expand_as(layer.q).clone()
        optimizer.step()

    for _ in range(6):
        push(0)
    dead = [~layer.mask for layer in layers(model)]
    assert any(mask.any() for mask in dead)
    assert not masked_lambdas(model).any()
    push(1)
    # Step 7 allocates nothing: what is masked has moved, and counts for the forward.
    assert (masked_lambdas(model) != 0).all()
    for _ in range(3):
        push(1)
    revived = [layer.mask & was_dead for layer, was_dead in zip(layers(model), dead, strict=True)]
    assert any(mask.any() for mask in revived)
    assert live(model) == tuner.budget() == 6
    push(1)
    assert not masked_lambdas(model).any()


def test_in_the_final_phase_the_mask_holds_after_every_step() -> None:
    """Ranks stay as the final allocation set them; dead λ are 0 after each step, live ones keep training."""
    model = wrapped(train_lambda=True)
    optimizer = attached(model)
    for _ in range(14):
        step(model, optimizer)
    masks = [layer.mask.clone() for layer in layers(model)]
    for _ in range(6):
        before = [layer.lam.detach().clone() for layer in layers(model)]
        step(model, optimizer)
        assert not masked_lambdas(model).any()
        for layer, mask, old in zip(layers(model), masks, before, strict=True):
            assert torch.equal(layer.mask, mask)
            assert (layer.lam[mask] != old[mask]).all()
    assert masked_lambdas(model).numel() == 6


@pytest.mark.parametrize("gamma", [0.0, 0.1])
def test_init_rank_equal_to_target_rank_trains_and_prunes_nothing(gamma: float) -> None:
    """Masks stay full through every allocation, and training works."""
    model = wrapped(init_rank=2, target_rank=2, gamma=gamma)
    optimizer = attached(model)
    losses = [step(model, optimizer) for _ in range(TOTAL)]
    assert losses[-1] < losses[0]
    assert all(layer.mask.all() for layer in layers(model))
    assert all(change.budget == 6 for change in tunerkit.tuner(model).history)


@pytest.mark.filterwarnings("ignore:these adapters never ran")  # core tells it, rightly
@pytest.mark.parametrize("gamma", [0.0, 0.1])
def test_a_layer_without_gradient_is_pruned_first(gamma: float) -> None:
    """A layer that forward doesn't use has no importance; nothing fails, and the budget is exact."""

    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.unused, self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.two(torch.tanh(self.one(x)))
            return found

    model = wrapped(Skips(), targets=["unused", "one", "two"], gamma=gamma)
    optimizer = attached(model)
    for _ in range(TOTAL):
        step(model, optimizer)
    ranks = tunerkit.tuner(model).ranks()
    assert sum(ranks.values()) == 6
    assert ranks["unused"] == 0


@pytest.mark.parametrize("frozen", ["p", "lam", "q"])
def test_a_frozen_weight_has_no_importance_and_stays(frozen: str) -> None:
    """If one of a layer's three weights is frozen, the rest trains and the budget is exact."""
    model = wrapped(gamma=0.1)
    weight = getattr(layers(model)[0], frozen)
    weight.requires_grad_(False)
    before = weight.detach().clone()
    optimizer = attached(model)
    for _ in range(5):
        step(model, optimizer)
    assert torch.equal(weight, before)
    for _ in range(15):
        step(model, optimizer)
    assert live(model) == 6


@pytest.mark.parametrize("exact_svd", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_gradients_that_are_not_finite_are_left_out_and_reported(value: float, exact_svd: bool) -> None:
    """One bad step: averages stay finite, the next allocation warns with the count, and pruning stays exact."""
    model = wrapped(exact_svd=exact_svd)
    tuner = tunerkit.tuner(model)
    for layer in layers(model):
        nn.init.normal_(layer.p)  # at rest, P = 0 would leave every score at 0
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)  # the weights themselves stay finite
    tunerkit.attach(model, optimizer, total_steps=TOTAL)

    def bad_step() -> None:
        loss_of(model).backward()
        kept = [p.detach().clone() for p in trainable(model)]
        for layer in layers(model)[:2]:
            assert layer.q.grad is not None
            layer.q.grad[0, 0] = value
        optimizer.step()
        with torch.no_grad():  # a rate of 0 times infinity is NaN
            for parameter, old in zip(trainable(model), kept, strict=True):
                parameter.copy_(old)

    for _ in range(4):
        step(model, optimizer)
    optimizer.zero_grad()
    bad_step()
    with pytest.warns(tunerkit.TunerkitWarning, match=r"\b2 of 54 gradients were not finite"):
        step(model, optimizer)
    training = training_of(tuner)
    assert all(bool(t.isfinite().all()) for t in itertools.chain(*training.averages))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(TOTAL - 6):
            step(model, optimizer)
    assert live(model) == 6


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradients_that_are_all_bad_since_the_last_allocation_are_an_error(value: float) -> None:
    """The scores of a diverged run are outdated: the allocation raises, and the masks stay."""
    model = wrapped()
    optimizer = attached(model)
    train(model, optimizer, 6)
    masks = [layer.mask.clone() for layer in layers(model)]
    with pytest.raises(
        tunerkit.errors.StepError, match=r"no usable gradient in the 3 steps.* all 27 were NaN or infinite"
    ):
        bad_steps(model, optimizer, value)
    assert tunerkit.tuner(model).steps == 9
    assert all(torch.equal(layer.mask, mask) for layer, mask in zip(layers(model), masks, strict=True))


def bad_steps(model: nn.Module, optimizer: torch.optim.Optimizer, value: float | None) -> None:
    """Step with the same gradient everywhere, or with none, until something raises or training ends."""
    for _ in range(TOTAL):
        for parameter in trainable(model):
            parameter.grad = None if value is None else torch.full_like(parameter, value)
        optimizer.step()


@pytest.mark.parametrize(
    ("bounds", "least", "most"),
    [
        ({"min_rank": 1}, (1, 1, 1), (4, 4, 4)),
        ({"max_rank": 3}, (0, 0, 0), (3, 3, 3)),
        ({"min_rank": 2, "max_rank": 2}, (2, 2, 2), (2, 2, 2)),
        ({"min_rank": {"4": 3}}, (0, 0, 3), (4, 4, 4)),
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
        with torch.no_grad():  # without bounds this one would take all it can
            layers(model)[favoured].lam.fill_(5.0)
        optimizer = attached(model)
        for _ in range(TOTAL):
            step(model, optimizer)
        ranks = tuple(tunerkit.tuner(model).ranks().values())
        assert all(low <= rank <= high for low, rank, high in zip(least, ranks, most, strict=True)), ranks
        assert sum(ranks) == 6


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ({"min_rank": 3}, "minimum ranks need 9, but the final budget is 6"),
        ({"max_rank": 1}, "maximum ranks admit 3, but the final budget is 6"),
        ({"min_rank": {"2": 3}, "max_rank": 2}, "minimum 3 is above maximum 2 at 2"),
        ({"min_rank": {"2": 5}}, "minimum 5 is above maximum 4 at 2"),
        ({"min_rank": {"2": 5}, "max_rank": 9}, "minimum 5 is above maximum 4 at 2"),
    ],
)
def test_bounds_that_the_budget_cannot_meet_are_refused_when_attaching(bounds: dict[str, Any], words: str) -> None:
    """The message has the numbers and the target; nothing is attached."""
    model = wrapped(**bounds)
    with pytest.raises(tunerkit.errors.ConfigError, match=words):
        attached(model)
    assert tunerkit.tuner(model).state is None


@given(budget=st.integers(min(COSTS), 4 * sum(COSTS)), seed=st.integers(0, 20))
@settings(max_examples=25, deadline=None)
def test_a_budget_in_parameters_keeps_the_longest_prefix_of_the_ranking(budget: int, seed: int) -> None:
    """Compared with a slow loop over the triplets by score: the first that doesn't fit ends it."""
    model = wrapped(
        seed=seed, target_rank=None, budget=budget, budget_unit="parameters", t_init=0, t_final=2, delta_t=99
    )
    optimizer = attached(model, 6)
    for _ in range(3):
        step(model, optimizer)
    training = training_of(tunerkit.tuner(model))
    products = [s * u for s, u in zip(*training.averages, strict=True)]
    ranking = []
    for index, cost in enumerate(COSTS):
        p, lam, q = products[3 * index : 3 * index + 3]
        score = lam + (p.mean(0) + q.mean(1))
        ranking += [(-float(score[i]), index, i, cost) for i in range(len(score))]
    expected, spent = set(), 0
    for _, index, i, cost in sorted(ranking):
        spent += cost
        if spent > budget:
            break
        expected.add((index, i))
    step(model, optimizer)
    found = {(k, int(i)) for k, layer in enumerate(layers(model)) for i in layer.mask.nonzero()}
    assert found == expected


def test_finish_makes_the_final_allocation_early() -> None:
    """After 5 of 20 steps it prunes to the final budget with one history entry. A second call does nothing."""
    model = wrapped()
    tuner = tunerkit.tuner(model)
    optimizer = attached(model)
    for _ in range(5):
        step(model, optimizer)
    assert live(model) == 12
    tuner.finish()
    assert live(model) == tuner.budget() == 6
    assert [(change.step, change.budget) for change in tuner.history] == [(5, 6)]
    masks = [layer.mask.clone() for layer in layers(model)]
    for _ in range(15):
        step(model, optimizer)
        assert not masked_lambdas(model).any()
    tuner.finish()
    assert all(torch.equal(layer.mask, mask) for layer, mask in zip(layers(model), masks, strict=True))
    assert len(tuner.history) == 1


def test_finish_before_attaching_is_refused() -> None:
    """Without training there is no importance to allocate by."""
    with pytest.raises(tunerkit.errors.StepError, match=r"tunerkit\.attach"):
        tunerkit.tuner(wrapped()).finish()


def test_history_has_each_allocation_with_its_budget_and_ranks() -> None:
    """Steps follow the schedule, budgets the cubic; ranks sum to the budgets, and the last are the tuner's."""
    model = wrapped()
    tuner = tunerkit.tuner(model)
    optimizer = attached(model)
    for _ in range(TOTAL):
        step(model, optimizer)
    assert [change.step for change in tuner.history] == [6, 9, 12, 14]
    for change in tuner.history:
        assert change.budget == 6 + math.floor(6 * (1 - (change.step - 4) / 10) ** 3 + 1e-9)
        assert sum(change.ranks.values()) == change.budget == tuner.budget(change.step)
    assert dict(tuner.history[-1].ranks) == tuner.ranks()


def test_budget_of_a_step_before_attaching_and_after_loading(tmp_path: Path) -> None:
    """With total_steps in the config or the file, the schedule is known at once.

    Otherwise the error says what to do.
    """
    model = wrapped(total_steps=TOTAL)
    tuner = tunerkit.tuner(model)
    schedule = plan(total_steps=TOTAL, t_init=4, t_final=6, delta_t=3, initial=12, target=6)
    expected = [schedule.budget(number) for number in range(TOTAL + 3)]
    assert [tuner.budget(number) for number in range(TOTAL + 3)] == expected
    assert tuner.budget() == 12
    optimizer = adamw(model)
    tunerkit.attach(model, optimizer)
    for _ in range(TOTAL):
        step(model, optimizer)
    assert [tuner.budget(number) for number in range(TOTAL + 3)] == expected
    loaded = tunerkit.tuner(tunerkit.load(net(), tunerkit.save(model, tmp_path)))
    assert [loaded.budget(number) for number in range(TOTAL + 3)] == expected
    assert loaded.budget() == 6
    with pytest.raises(tunerkit.errors.StepError, match="total_steps"):
        tunerkit.tuner(wrapped()).budget(3)


@pytest.mark.parametrize("exact_svd", [False, True])
def test_attaching_a_loaded_adapter_begins_a_new_training_with_all_triplets(exact_svd: bool, tmp_path: Path) -> None:
    """Training a pruned adapter again starts from b(0), and prunes again."""
    model = wrapped(exact_svd=exact_svd)
    optimizer = attached(model)
    for _ in range(TOTAL):
        step(model, optimizer)
    loaded = tunerkit.load(net(), tunerkit.save(model, tmp_path), trainable=True)
    assert live(loaded) == 6
    optimizer = attached(loaded, 10 + 1)
    assert live(loaded) == tunerkit.tuner(loaded).budget() == 6  # until the first step it can be saved as it is
    step(loaded, optimizer)
    assert live(loaded) == tunerkit.tuner(loaded).budget() == 12
    for _ in range(10):
        step(loaded, optimizer)
    assert live(loaded) == 6


def test_a_budget_that_buys_no_triplet_is_refused() -> None:
    """A budget that is effectively zero is rejected at attach, with the cost of the cheapest triplet."""
    model = wrapped(target_rank=None, budget=min(COSTS) - 1, budget_unit="parameters")
    with pytest.raises(tunerkit.errors.ConfigError, match=rf"the cheapest costs {min(COSTS)}; raise it @ \$\.budget"):
        attached(model)


def test_adapters_without_any_gradient_are_refused_at_the_allocation() -> None:
    """Without scores, pruning would go by position: the error says so, and names the usual cause."""
    model = wrapped()
    optimizer = attached(model)
    with pytest.raises(tunerkit.errors.StepError, match=r"no usable gradient in the 6 steps.*use_reentrant"):
        bad_steps(model, optimizer, None)


def test_an_allocation_right_after_another_triggers_no_warning() -> None:
    """At T - t_f averaging stops, so it is expected that no step was averaged since the previous allocation."""
    model = wrapped(t_init=0, t_final=3, delta_t=2)
    optimizer = attached(model, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", tunerkit.TunerkitWarning)
        for _ in range(8):
            step(model, optimizer)
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
    with pytest.warns(tunerkit.TunerkitWarning, match="every score is 0"):
        step(model, optimizer, lambda model: 1e-30 * loss_of(model))
    assert live(model) == tunerkit.tuner(model).budget()


def test_an_optimizer_without_the_adapters_is_refused_whatever_heads_it_holds() -> None:
    """A head trained in full is part of the adapter's file, but its training says nothing about ranks."""
    model = wrapped(targets=("0", "2"), train_modules=("4",))
    head = [p for n, p in model.named_parameters() if ".copy." in n]
    with pytest.raises(tunerkit.errors.StepError, match="has none of the parameters"):
        tunerkit.attach(model, torch.optim.SGD(head, lr=0.1), total_steps=TOTAL)
    part = [p for n, p in model.named_parameters() if n.startswith("0.tunerkit.")]
    with pytest.warns(
        tunerkit.TunerkitWarning, match="adapter.p, adapter.lam, adapter.q at 2; copy.weight, copy.bias at 4"
    ):
        tunerkit.attach(model, torch.optim.SGD(part, lr=0.1), total_steps=TOTAL)


def test_saving_above_the_final_budget_triggers_a_warning(tmp_path: Path) -> None:
    """Training that ends before T - t_f leaves more triplets than requested; `finish` prunes them."""
    model = wrapped()
    step(model, attached(model))
    with pytest.warns(tunerkit.TunerkitWarning, match="above the final"):
        tunerkit.save(model, tmp_path)
    tunerkit.tuner(model).finish()
    with warnings.catch_warnings():
        warnings.simplefilter("error", tunerkit.TunerkitWarning)
        tunerkit.save(model, tmp_path)


def test_saving_without_a_step_is_refused(tmp_path: Path) -> None:
    """Without any step, the error says what was forgotten, and no file is written. A loaded adapter may be saved."""
    model = wrapped()
    with pytest.raises(tunerkit.errors.AdapterError, match=r"tunerkit\.attach"):
        tunerkit.save(model, tmp_path / "none")
    attached(model)
    with pytest.raises(tunerkit.errors.AdapterError, match="0 steps"):
        tunerkit.save(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("total", [1, 2, 3, 4, 5])
def test_a_training_too_short_to_choose_what_to_prune_is_refused(total: int) -> None:
    """Scores of so few gradients say nothing. Six steps are enough, and without pruning any number is."""
    model = wrapped(t_init=0.1, t_final=0.3, delta_t=10)
    with pytest.raises(tunerkit.errors.ConfigError, match=rf"at least 6 steps, got {total}.*@ \$\.total_steps"):
        tunerkit.attach(model, adamw(model), total_steps=total)
    tunerkit.attach(model, adamw(model), total_steps=6)
    fixed = wrapped(t_init=0.1, t_final=0.3, delta_t=10, target_rank=2, init_rank=2, exact_svd=False)
    tunerkit.attach(fixed, adamw(fixed), total_steps=total)


@pytest.mark.parametrize("spans", [{}, {"t_init": 0.1, "t_final": 0.3}], ids=["steps", "shares"])
@pytest.mark.parametrize("shrink", [True, False])
def test_a_finished_adapter_trains_a_few_steps_more(shrink: bool, spans: dict[str, Any], tmp_path: Path) -> None:
    """Nothing is left to prune, so any number of steps will do, and the ranks stay; it can be resumed too."""
    model = wrapped(shrink=shrink, **spans)
    train(model, attached(model), TOTAL)
    ranks, file = tunerkit.tuner(model).ranks(), tunerkit.save(model, tmp_path / "finished")
    for total in (1, 2, 5):
        more = tunerkit.load(net(), file, trainable=True)
        before, optimizer = weights(more), attached(more, total)
        with pytest.warns(tunerkit.TunerkitWarning, match="is left to prune") if shrink else nullcontext():
            train(more, optimizer, total)
        tuner = tunerkit.tuner(more)
        assert (tuner.ranks(), tuner.budget(), sum(ranks.values())) == (ranks, 6, 6)
        assert not torch.equal(weights(more)[0], before[0])
        again = tunerkit.load(net(), tunerkit.save(more, tmp_path / "more"), trainable=True)
        attached(again, total)
        tunerkit.load_state(again, tunerkit.save_state(more, tmp_path / "more"))
        assert (tunerkit.tuner(again).ranks(), tunerkit.tuner(again).budget()) == (ranks, 6)
        assert torch.equal(loss_of(again), loss_of(more))


@pytest.mark.filterwarnings("ignore:.*above the final 6")
@pytest.mark.parametrize("shrink", [True, False])
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
    with pytest.raises(
        AdapterError, match=r"keep 12, .* set a budget of 6: .*optimizer's state_dict.* of step 20 again"
    ):
        tunerkit.save(model, tmp_path)
    assert file.read_bytes() == data
    model.load_state_dict(finished)
    tunerkit.save(model, tmp_path)
    assert file.read_bytes() == data
    model.load_state_dict(middle[0])
    optimizer.load_state_dict(middle[1])
    tunerkit.save(model, tmp_path)
    assert sum(tunerkit.tuner(tunerkit.load(net(), tmp_path)).ranks().values()) == 12


def test_a_state_of_mid_training_in_a_finished_adapter_is_refused(tmp_path: Path) -> None:
    """Its masks would revive what is pruned, with λ at 0. Nothing changes."""
    model = wrapped()
    optimizer = attached(model)
    train(model, optimizer, 4)
    state = tunerkit.save_state(model, tmp_path)
    train(model, optimizer, TOTAL - 4)
    before = weights(model)
    with pytest.raises(
        FileError, match="the masks keep 6 triplets that are pruned in the adapter, whose weights are of"
    ):
        tunerkit.load_state(model, state)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))
    assert tunerkit.tuner(model).steps == TOTAL
