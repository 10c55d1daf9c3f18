"""What `allocations` draws covers what a training can give to an allocator."""

import math

import pytest
from hypothesis import find, given, settings, strategies as st

from tunerkit_testing.strategies import Allocation, allocations

SEARCH = settings(max_examples=300, database=None)


@given(allocations())
@settings(max_examples=20)
def test_a_sequence_has_the_same_ranks_and_a_budget_that_falls(drawn: list[Allocation]) -> None:
    """Law: each budget is between 0 and all ranks, and none is above the one before it."""
    budgets = [each.budget for each in drawn]
    assert len({tuple(map(len, each.scores)) for each in drawn}) == 1
    assert budgets == sorted(budgets, reverse=True)
    assert all(0 <= each.budget <= sum(map(len, each.scores)) for each in drawn)
    assert all(math.isfinite(score) for each in drawn for row in each.scores for score in row)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, lambda drawn: any(len(set(row)) < len(row) for row in drawn[0].scores)),
        ({}, lambda drawn: any(not row for row in drawn[0].scores)),
        ({"rising": True}, lambda drawn: drawn[0].budget < drawn[-1].budget),
        ({"scores": st.just(math.nan)}, lambda drawn: any(map(math.isnan, drawn[0].scores[0]))),
    ],
    ids=["ties", "a target without ranks", "a rising budget", "scores that are NaN"],
)
def test_hard_cases_are_drawn(options: dict[str, object], wanted: object) -> None:
    """Law: what breaks an allocator is among what is drawn."""
    find(allocations(**options), wanted, settings=SEARCH)  # type: ignore[arg-type]
