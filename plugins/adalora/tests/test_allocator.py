"""The allocation compared with a brute-force ranking written in plain Python."""

import math
from collections.abc import Sequence
from itertools import compress
from typing import Any

import attrs
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch import Tensor

from tunerkit_adalora.allocator import allocate

# Few different values, so that ties, zeros of both signs and extremes are common; else any finite fp32 number.
finite = st.sampled_from([0.0, -0.0, 1.0, 2.0, 1e-45, 3e38, -1.0]) | st.floats(
    allow_nan=False, allow_infinity=False, width=32
)
any_float = finite | st.sampled_from([math.nan, math.inf, -math.inf])


def rows(values: st.SearchStrategy[float]) -> st.SearchStrategy[list[list[float]]]:
    """Scores of up to five targets of rank 0 to 5."""
    return st.lists(st.lists(values, max_size=5), min_size=1, max_size=5)


def tensors(scores: Sequence[Sequence[float]]) -> list[Tensor]:
    """The scores as `allocate` takes them."""
    return [torch.tensor(row, dtype=torch.float32) for row in scores]


def lists(masks: Sequence[Tensor]) -> list[list[bool]]:
    """The masks as plain lists."""
    return [mask.tolist() for mask in masks]


@attrs.frozen
class Problem:
    scores: list[list[float]]
    keep: int
    costs: list[int]
    minimum: list[int]
    maximum: list[int]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Any scores, costs, bounds and budgets, from just below zero to just above the total cost."""
    scores = draw(rows(any_float))
    each = [st.integers(0, len(row) + 1) for row in scores]
    dearest = draw(st.sampled_from([1, 4]))
    costs = [draw(st.integers(1, dearest)) for _ in scores]
    total = sum(cost * len(row) for cost, row in zip(costs, scores, strict=True))
    return Problem(
        scores=scores,
        keep=draw(st.integers(-1, total + 1)),
        costs=costs,
        minimum=[draw(bound) for bound in each],
        maximum=[draw(bound) for bound in each],
    )


def brute_force(p: Problem) -> list[list[bool]]:
    """Sort everything by (tier, score, target, index), then spend until something doesn't fit."""

    def score(target: int, i: int) -> float:
        value = p.scores[target][i]
        return -math.inf if math.isnan(value) else value

    def entry(target: int, i: int) -> tuple[int, float, int, int]:
        better = sum(
            score(target, j) > score(target, i) or (score(target, j) == score(target, i) and j < i)
            for j in range(len(p.scores[target]))
        )
        tier = 0 if better < p.minimum[target] else 1 if better < p.maximum[target] else 2
        return tier, -score(target, i), target, i

    kept, left = [[False] * len(row) for row in p.scores], p.keep
    for _, _, target, i in sorted(entry(t, i) for t, row in enumerate(p.scores) for i in range(len(row))):
        left -= p.costs[target]
        if left < 0:
            break
        kept[target][i] = True
    return kept


@given(problems())
@settings(max_examples=400)
def test_an_allocation_is_the_brute_force_one(p: Problem) -> None:
    """For any scores, costs, bounds and budget the masks equal those of an obvious sort."""
    masks = allocate(tensors(p.scores), p.keep, costs=p.costs, minimum=p.minimum, maximum=p.maximum)
    assert lists(masks) == brute_force(p)


@given(rows(finite), st.integers(-3, 30))
@example([[0.0, -0.0], [0.0]], 2)
def test_an_allocation_keeps_exactly_the_budget(scores: list[list[float]], keep: int) -> None:
    """For any finite scores, including ties and zeros, exactly ``keep`` triplets stay, or all, or none."""
    masks = allocate(tensors(scores), keep)
    total = sum(map(len, scores))
    assert [len(mask) for mask in masks] == [len(row) for row in scores]
    assert all(mask.dtype == torch.bool for mask in masks)
    assert sum(int(mask.sum()) for mask in masks) == max(0, min(keep, total))


@given(rows(finite), st.integers(0, 25))
def test_no_lower_score_is_kept_over_a_higher_one(scores: list[list[float]], keep: int) -> None:
    """Every score that is kept is at least as high as every score that is pruned."""
    masks = lists(allocate(tensors(scores), keep))
    flat = [(s, m) for row, mask in zip(scores, masks, strict=True) for s, m in zip(row, mask, strict=True)]
    kept, gone = [s for s, m in flat if m], [s for s, m in flat if not m]
    assert min(kept, default=math.inf) >= max(gone, default=-math.inf)


@given(problems())
def test_within_the_bounds_no_lower_score_is_kept_over_a_higher_one(p: Problem) -> None:
    """A target above its minimum and one below its maximum never trade a lower score for a higher one."""
    masks = lists(allocate(tensors(p.scores), p.keep, minimum=p.minimum, maximum=p.maximum))
    ranks = [sum(mask) for mask in masks]
    clean = [[-math.inf if math.isnan(s) else s for s in row] for row in p.scores]
    for a, above in enumerate(ranks):
        for b, below in enumerate(ranks):
            if p.minimum[a] < above and below < p.maximum[b]:
                kept = [s for s, m in zip(clean[a], masks[a], strict=True) if m]
                gone = [s for s, m in zip(clean[b], masks[b], strict=True) if not m]
                assert min(kept, default=math.inf) >= max(gone, default=-math.inf)


@given(problems())
@settings(max_examples=200)
def test_minimum_and_maximum_hold_wherever_the_budget_allows(p: Problem) -> None:
    """Minima hold if the budget covers all of them; a maximum is exceeded only if every maximum is reached."""
    ranks = [int(mask.sum()) for mask in allocate(tensors(p.scores), p.keep, minimum=p.minimum, maximum=p.maximum)]
    least = [min(low, len(row)) for low, row in zip(p.minimum, p.scores, strict=True)]
    most = [max(low, min(high, len(row))) for low, high, row in zip(least, p.maximum, p.scores, strict=True)]
    if p.keep >= sum(least):
        assert all(rank >= low for rank, low in zip(ranks, least, strict=True))
    if p.keep <= sum(most):
        assert all(rank <= high for rank, high in zip(ranks, most, strict=True))
    else:
        assert all(rank >= high for rank, high in zip(ranks, most, strict=True))


@given(problems())
def test_costs_spend_the_longest_prefix_that_fits(p: Problem) -> None:
    """The kept triplets never cost more than the budget, and the rest is less than the most expensive triplet."""
    masks = allocate(tensors(p.scores), p.keep, costs=p.costs)
    spent = sum(cost * int(mask.sum()) for cost, mask in zip(p.costs, masks, strict=True))
    assert spent <= max(0, p.keep)
    if not all(bool(mask.all()) for mask in masks):
        assert p.keep - spent < max(p.costs)


@given(problems(), st.data())
def test_a_triplet_without_lambda_costs_nothing_and_never_stays(p: Problem, data: st.DataObject) -> None:
    """Without bounds the others are allocated as if it did not exist, whatever its score."""
    scores = [[0.0 if math.isnan(score) else max(score, -1e30) for score in row] for row in p.scores]
    alive = [[data.draw(st.booleans()) for _ in row] for row in scores]
    lams = [-0.5 * torch.tensor(row, dtype=torch.float32) for row in alive]
    found = lists(allocate(tensors(scores), p.keep, costs=p.costs, lams=lams))
    others = [list(compress(row, living)) for row, living in zip(scores, alive, strict=True)]
    expected = lists(allocate(tensors(others), p.keep, costs=p.costs))
    assert [list(compress(row, living)) for row, living in zip(found, alive, strict=True)] == expected
    assert sum(map(sum, found)) == sum(map(sum, expected))


@given(rows(st.integers(-1000, 1000).map(float)), st.integers(0, 25), st.integers(-60, 60))
def test_the_scale_of_the_scores_does_not_matter(scores: list[list[float]], keep: int, power: int) -> None:
    """All scores times 2^k (exact in floats) give the same masks."""
    scaled = [[s * 2.0**power for s in row] for row in scores]
    assert lists(allocate(tensors(scaled), keep)) == lists(allocate(tensors(scores), keep))


@given(problems(), st.integers(-2, 60))
def test_masks_nest_while_the_budget_falls_on_fixed_scores(p: Problem, less: int) -> None:
    """What a smaller budget keeps, a larger one keeps too."""
    small, large = sorted((p.keep, less))
    bounds: dict[str, Any] = {"costs": p.costs, "minimum": p.minimum, "maximum": p.maximum}
    inner, outer = (allocate(tensors(p.scores), keep, **bounds) for keep in (small, large))
    assert all(bool((i <= o).all()) for i, o in zip(inner, outer, strict=True))


@pytest.mark.parametrize("zeros", [(0.0, 0.0, 0.0), (-0.0, 0.0, -0.0), (0.0, -0.0, 0.0)])
def test_ties_go_to_the_earlier_target_then_the_lower_index(zeros: tuple[float, float, float]) -> None:
    """Equal scores, including zeros of either sign, are kept in order."""
    a, b, c = zeros
    scores = tensors([[a, b], [5.0, c]])
    assert lists(allocate(scores, 2)) == [[True, False], [True, False]]
    assert lists(allocate(scores, 3)) == [[True, True], [True, False]]


def test_nan_scores_are_the_lowest() -> None:
    """Sorting treats NaN as the largest; here it is pruned first."""
    assert lists(allocate(tensors([[math.nan, -1e30], [math.nan, 3.0]]), 2)) == [[False, True], [False, True]]


def test_a_maximum_yields_only_where_the_budget_cannot_be_spent_otherwise() -> None:
    """A target at its maximum yields to worse scores elsewhere until nothing else can be kept."""
    scores = tensors([[9.0, 8.0, 7.0], [2.0, 1.0]])
    kept = [lists(allocate(scores, keep, maximum=[1, 2])) for keep in (2, 3, 4)]
    assert kept[0] == [[True, False, False], [True, False]]
    assert kept[1] == [[True, False, False], [True, True]]
    assert kept[2] == [[True, True, False], [True, True]]


def test_a_minimum_comes_before_every_higher_score() -> None:
    """A target keeps its best triplets up to the minimum, however low their scores."""
    scores = tensors([[9.0, 8.0, 7.0], [1.0, 2.0]])
    assert lists(allocate(scores, 2, minimum=[0, 1])) == [[True, False, False], [False, True]]
    # Where minimum and maximum disagree, the minimum holds.
    assert lists(allocate(scores, 2, minimum=[0, 2], maximum=[3, 0])) == [[False, False, False], [True, True]]


def test_half_precision_and_double_scores_are_ranked_together() -> None:
    """Scores are compared in the widest of their types and at least in fp32."""
    half, double = torch.tensor([1.0], dtype=torch.float16), torch.tensor([1 + 1e-12], dtype=torch.float64)
    assert lists(allocate([half, double], 1)) == [[False], [True]]


def test_scores_are_left_as_they_were() -> None:
    """Allocation is pure: it doesn't change its arguments."""
    scores = tensors([[math.nan, -0.0], [1.0]])
    allocate(scores, 1)
    assert math.isnan(scores[0][0])
    assert math.copysign(1, scores[0][1].item()) == -1


def test_nothing_to_allocate_is_no_masks() -> None:
    """No targets give no masks; targets of rank 0 give empty masks."""
    assert allocate([], 3) == []
    assert lists(allocate(tensors([[], []]), 3)) == [[], []]
