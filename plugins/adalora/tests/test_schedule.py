"""The schedule, compared step by step with the paper's formula in exact fractions."""

import itertools
import math
from fractions import Fraction

import attrs
import pytest
from hypothesis import example, given, strategies as st

from tunerkit.errors import ConfigError
from tunerkit_adalora.schedule import Allocation, Schedule, plan


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Any schedule that `plan` accepts, up to 120 steps."""
    total = draw(st.integers(1, 120))
    t_init = draw(st.integers(0, total - 1))
    t_final = draw(st.integers(0, total - 1 - t_init))
    target = draw(st.integers(1, 10**6))
    return plan(
        total_steps=total,
        t_init=t_init,
        t_final=t_final,
        delta_t=draw(st.integers(1, 20)),
        initial=target + draw(st.integers(0, 10**6)),
        target=target,
    )


def paper_allocations(s: Schedule) -> list[int]:
    """The allocation steps, listed one by one."""
    final = s.total_steps - s.t_final
    return [t for t in range(1, final) if t > s.t_init and t % s.delta_t == 0] + [final]


def paper_budget(s: Schedule, t: int) -> int:
    """b(t) in fractions, rounded down."""
    if t <= s.t_init:
        return s.initial
    if t >= s.total_steps - s.t_final:
        return s.target
    share = 1 - Fraction(t - s.t_init, s.total_steps - s.t_final - s.t_init)
    return math.floor(s.target + (s.initial - s.target) * share**3)


@given(schedules())
def test_b_of_t_is_the_cubic_of_the_paper_rounded_down(s: Schedule) -> None:
    """cubic(t) is b(T) + (b(0) − b(T))(1 − (t − t_i)/(T − t_i − t_f))³, rounded down, at every step."""
    steps = range(s.total_steps + 2)
    assert [s.cubic(t) for t in steps] == [paper_budget(s, t) for t in steps]


def test_b_of_t_does_not_lose_a_unit_to_floating_point() -> None:
    """If the cubic is a whole number, the budget is that number, although floats end below it."""
    s = plan(total_steps=10, t_init=0, t_final=0, delta_t=1, initial=1001, target=1)
    assert int(1000 * (1 - 3 / 10) ** 3 + 1) == 343  # the float's answer
    assert s.cubic(3) == 344


@given(schedules())
def test_the_budget_never_rises_and_its_ends_are_exact(s: Schedule) -> None:
    """budget(step) falls from exactly ``initial`` to exactly ``target`` and never rises."""
    budgets = [s.budget(t) for t in range(s.total_steps + 3)]
    assert budgets == sorted(budgets, reverse=True)
    assert set(budgets[: min(s.t_init + 1, s.final_step)]) == {s.initial}
    assert set(budgets[s.final_step :]) == {s.target}


@given(schedules(), st.lists(st.integers(1, 9), max_size=30))
def test_the_allocations_of_a_walk_spend_the_budget_and_end_with_the_final_one(s: Schedule, jumps: list[int]) -> None:
    """However step numbers jump, each allocation spends b(t) of the last t in the gap, and only one is final."""
    steps = [0, *itertools.accumulate([*jumps, s.total_steps])]
    found = [s.allocation(previous, step) for previous, step in itertools.pairwise(steps)]
    for (previous, step), allocation in zip(itertools.pairwise(steps), found, strict=True):
        inside = [t for t in paper_allocations(s) if previous < t <= step]
        assert (allocation is None) == (not inside)
        if allocation is not None:
            assert allocation == Allocation(paper_budget(s, inside[-1]), final=inside[-1] == s.final_step)
    assert [allocation for allocation in found if allocation and allocation.final] == [s.final_allocation]


@given(schedules())
def test_the_budget_in_force_changes_at_allocations_only(s: Schedule) -> None:
    """budget(step) equals the result of a loop over all steps that takes b(t) at each allocation."""
    in_force = s.initial
    for t in range(s.total_steps + 3):
        if t in paper_allocations(s):
            in_force = paper_budget(s, t)
        assert s.budget(t) == in_force


@given(schedules())
def test_allocations_fall_on_multiples_of_delta_t_inside_and_on_the_final_step(s: Schedule) -> None:
    """An allocation is due at multiples of Δ_T strictly between t_i and T − t_f, at T − t_f, and nowhere else."""
    assert [t for t in range(s.total_steps + 3) if s.due(t - 1, t) == t] == paper_allocations(s)


@given(schedules(), st.data())
def test_due_is_the_last_allocation_among_the_steps_since(s: Schedule, data: st.DataObject) -> None:
    """due(previous, step) is the largest allocation step in (previous, step], or None."""
    previous = data.draw(st.integers(0, s.total_steps + 2))
    step = data.draw(st.integers(previous, s.total_steps + 4))
    inside = [t for t in paper_allocations(s) if previous < t <= step]
    assert s.due(previous, step) == max(inside, default=None)


@given(schedules(), st.lists(st.integers(1, 130), max_size=12))
def test_skipped_steps_never_miss_an_allocation(s: Schedule, seen: list[int]) -> None:
    """Calling due() at only some steps gives, at each of them, the same budget as calling it at every step."""
    previous, in_force = 0, s.initial
    for step in sorted(seen):
        due = s.due(previous, step)
        in_force = in_force if due is None else s.cubic(due)
        assert in_force == s.budget(step)
        previous = step


@given(schedules())
def test_the_distribution_is_final_from_the_final_step_on(s: Schedule) -> None:
    """is_final holds from T − t_f on, and nothing is allocated after it."""
    assert s.final_step == s.total_steps - s.t_final
    assert [s.is_final(t) for t in range(s.total_steps + 2)] == [
        t >= s.total_steps - s.t_final for t in range(s.total_steps + 2)
    ]
    assert s.due(s.final_step, s.total_steps + 100) is None


@given(st.integers(1, 5000), st.integers(0, 99), st.integers(0, 99))
@example(100, 29, 0)  # 0.29 * 100 is 28.999999999999996 in floats
def test_a_share_of_training_is_rounded_down_to_steps(total: int, init: int, final: int) -> None:
    """A float of p/100 means ⌊p·T/100⌋ steps; as an integer the same number of steps gives the same schedule."""
    t_init, t_final = init * total // 100, final * total // 100
    if t_init + t_final >= total:
        return
    by_share = plan(total_steps=total, t_init=init / 100, t_final=final / 100, delta_t=3, initial=12, target=8)
    assert by_share == plan(total_steps=total, t_init=t_init, t_final=t_final, delta_t=3, initial=12, target=8)
    assert (by_share.t_init, by_share.t_final) == (t_init, t_final)


def test_a_third_of_three_steps_is_one() -> None:
    """A share computed by a division means that fraction, although the float is slightly below it."""
    assert plan(total_steps=3, t_init=1 / 3, t_final=0, delta_t=1, initial=2, target=1).t_init == 1


def test_equal_initial_and_target_budgets_are_a_schedule() -> None:
    """A budget that never falls is allowed: every allocation keeps all of it."""
    s = plan(total_steps=9, t_init=1, t_final=2, delta_t=2, initial=5, target=5)
    assert {s.budget(t) for t in range(12)} == {5}


GOOD = {"total_steps": 100, "t_init": 10, "t_final": 20, "delta_t": 5, "initial": 12, "target": 8}


@pytest.mark.parametrize(
    ("change", "path", "words"),
    [
        ({"total_steps": 0}, "$.total_steps", "got 0"),
        ({"delta_t": 0}, "$.delta_t", "got 0"),
        ({"t_init": -1}, "$.t_init", "got -1"),
        ({"t_final": 1.0}, "$.t_final", "write 1 for steps"),
        ({"t_final": -0.5}, "$.t_final", "got -0.5"),
        ({"t_init": math.nan}, "$.t_init", "got nan"),
        ({"t_init": math.inf}, "$.t_init", "got inf"),
        ({"target": 0}, "$.target_rank", "got 0"),
        ({"target": -3}, "$.target_rank", "got -3"),
        ({"target": 13}, "$.target_rank", "target budget 13 is above the initial budget 12"),
        ({"t_init": 80}, "$.t_init", "no room"),
        ({"t_init": 0.5, "t_final": 0.5}, "$.t_init", "no room"),
    ],
)
def test_a_schedule_that_cannot_work_is_refused_in_words(change: dict[str, float], path: str, words: str) -> None:
    """Each impossible value is one problem with its path and the value."""
    with pytest.raises(ConfigError) as caught:
        plan(**(GOOD | change))  # type: ignore[arg-type]
    (problem,) = caught.value.problems
    assert problem.endswith(" @ " + path)
    assert words in problem


def test_all_problems_are_named_at_once() -> None:
    """One call raises one error with every problem; the budget's fields have the caller's names."""
    with pytest.raises(ConfigError) as caught:
        plan(total_steps=-1, t_init=1.5, t_final=-2, delta_t=-1, initial=3, target=4, target_field="budget")
    paths = [problem.rpartition(" @ ")[2] for problem in caught.value.problems]
    assert paths == ["$.total_steps", "$.delta_t", "$.t_init", "$.t_final", "$.budget"]


def test_room_for_a_single_step_is_room() -> None:
    """t_i + t_f may be at most T - 1."""
    assert plan(**(GOOD | {"t_init": 79})).final_step == 80  # type: ignore[arg-type]


def test_a_schedule_is_never_written_to() -> None:
    """A schedule is frozen."""
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        plan(**GOOD).target = 3  # type: ignore[arg-type, misc]
