"""The allocation compared with a brute-force ranking written in plain Python."""

import math
from collections.abc import Sequence
from itertools import compress
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from tunerkit_adalora.allocator import allocate

# Few different values, so that ties, zeros of both signs and extremes are common; else any finite fp32 number.
finite = st.sampled_from([0.0, -0.0, 1.0, 2.0, 1e-45, 3e38, -1.0]) | st.floats(
    allow_nan=False, allow_infinity=False, width=32
)
any_float = finite | st.sampled_from([math.nan, math.inf, -math.inf])


@attrs.frozen
class Problem:
    scores: list[list[float]]
    keep: int
    costs: list[int] | None = None
    minimum: list[int] | None = None
    maximum: list[int] | None = None


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Scores of up to five targets of rank 0 to 5, with any costs, bounds, and budgets around 0 to the total cost."""
    scores = draw(st.lists(st.lists(any_float, max_size=5), min_size=1, max_size=5))
    dearest = draw(st.sampled_from([1, 4]))
    costs = [draw(st.integers(1, dearest)) for _ in scores]
    total = sum(cost * len(row) for cost, row in zip(costs, scores, strict=True))
    minimum, maximum = ([draw(st.integers(0, len(row) + 1)) for row in scores] for _ in range(2))
    return Problem(scores, draw(st.integers(-1, total + 1)), costs, minimum, maximum)


def allocated(p: Problem, lams: list[Tensor] | None = None) -> list[list[bool]]:
    """The masks of `allocate` as plain lists."""
    masks = allocate(tensors(p.scores), p.keep, costs=p.costs, minimum=p.minimum, maximum=p.maximum, lams=lams)
    assert all(mask.dtype == torch.bool for mask in masks)
    return [mask.tolist() for mask in masks]


def tensors(scores: Sequence[Sequence[float]]) -> list[Tensor]:
    """The scores as `allocate` takes them."""
    return [torch.tensor(row, dtype=torch.float32) for row in scores]


def brute_force(p: Problem) -> list[list[bool]]:
    """Sort everything by (tier, score, target, index), then spend until something doesn't fit."""
    costs = p.costs or [1] * len(p.scores)
    minimum, maximum = p.minimum or [0] * len(p.scores), p.maximum or [*map(len, p.scores)]

    def score(target: int, i: int) -> float:
        value = p.scores[target][i]
        return -math.inf if math.isnan(value) else value

    def entry(target: int, i: int) -> tuple[int, float, int, int]:
        better = sum(
            score(target, j) > score(target, i) or (score(target, j) == score(target, i) and j < i)
            for j in range(len(p.scores[target]))
        )
        tier = 0 if better < minimum[target] else 1 if better < maximum[target] else 2
        return tier, -score(target, i), target, i

    kept, left = [[False] * len(row) for row in p.scores], p.keep
    for _, _, target, i in sorted(entry(t, i) for t, row in enumerate(p.scores) for i in range(len(row))):
        left -= costs[target]
        if left < 0:
            break
        kept[target][i] = True
    return kept


@given(problems(), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=400)
def test_an_allocation_is_the_brute_force_one(p: Problem, costs: bool, minimum: bool, maximum: bool) -> None:
    """For any scores and budget, and any costs and bounds or none, the masks equal those of an obvious sort."""
    given_alone = {"costs": costs, "minimum": minimum, "maximum": maximum}
    left_out: dict[str, Any] = {name: None for name, given in given_alone.items() if not given}
    p = attrs.evolve(p, **left_out)
    assert allocated(p) == brute_force(p)


EXAMPLES: dict[str, tuple[Problem, list[list[int]]]] = {
    "ties go to the earlier target": (Problem([[0, 0], [5, 0]], 2), [[1, 0], [1, 0]]),
    "ties go to the lower index": (Problem([[0, 0], [5, 0]], 3), [[1, 1], [1, 0]]),
    "zeros of both signs are equal": (Problem([[-0.0, 0], [5, -0.0]], 2), [[1, 0], [1, 0]]),
    "NaN is the lowest": (Problem([[math.nan, -1e30], [math.nan, 3]], 2), [[0, 1], [0, 1]]),
    "a full target yields to worse scores": (Problem([[9, 8, 7], [2, 1]], 3, maximum=[1, 2]), [[1, 0, 0], [1, 1]]),
    "a maximum yields if nothing else is left": (Problem([[9, 8, 7], [2, 1]], 4, maximum=[1, 2]), [[1, 1, 0], [1, 1]]),
    "a minimum comes before every higher score": (Problem([[9, 8, 7], [1, 2]], 2, minimum=[0, 1]), [[1, 0, 0], [0, 1]]),
    "a minimum above the maximum holds": (
        Problem([[9, 8, 7], [1, 2]], 2, minimum=[0, 2], maximum=[3, 0]),
        [[0, 0, 0], [1, 1]],
    ),
    "the first triplet that does not fit ends it": (Problem([[9], [5], [1]], 3, costs=[2, 2, 1]), [[1], [0], [0]]),
    "without targets there are no masks": (Problem([], 3), []),
    "targets of rank 0 have empty masks": (Problem([[], []], 3), [[], []]),
}  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_allocated_as_its_name_says(name: str) -> None:
    """The laws of the ranking, one by one."""
    problem, expected = EXAMPLES[name]
    assert allocated(problem) == expected


@given(problems(), st.data())
def test_a_triplet_without_lambda_costs_nothing_and_never_stays(p: Problem, data: st.DataObject) -> None:
    """Without bounds the others are allocated as if it did not exist, whatever its score."""
    scores = [[0.0 if math.isnan(score) else max(score, -1e30) for score in row] for row in p.scores]
    alive = [[data.draw(st.booleans()) for _ in row] for row in scores]
    lams = [-0.5 * torch.tensor(row, dtype=torch.float32) for row in alive]
    found = allocated(Problem(scores, p.keep, p.costs), lams)
    others = [list(compress(row, living)) for row, living in zip(scores, alive, strict=True)]
    expected = allocated(Problem(others, p.keep, p.costs))
    assert [list(compress(row, living)) for row, living in zip(found, alive, strict=True)] == expected
    assert sum(map(sum, found)) == sum(map(sum, expected))


def test_half_precision_and_double_scores_are_ranked_together() -> None:
    """Scores are compared in the widest of their types and at least in fp32."""
    half, double = torch.tensor([1.0], dtype=torch.float16), torch.tensor([1 + 1e-12], dtype=torch.float64)
    assert [mask.tolist() for mask in allocate([half, double], 1)] == [[False], [True]]


def test_scores_are_left_as_they_were() -> None:
    """Allocation is pure: it doesn't change its arguments."""
    scores = tensors([[math.nan, -0.0], [1.0]])
    allocate(scores, 1)
    assert math.isnan(scores[0][0])
    assert math.copysign(1, scores[0][1].item()) == -1
