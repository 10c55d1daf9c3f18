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
@example(plan(total_steps=10, t_init=0, t_final=0, delta_t=1, initial=1001, target=1))  # in floats b(3) is 343
@example(plan(total_steps=9, t_init=1, t_final=2, delta_t=2, initial=5, target=5))
def test_b_of_t_is_the_cubic_of_the_paper_rounded_down(s: Schedule) -> None:
    """cubic(t) is b(T) + (b(0) − b(T))(1 − (t − t_i)/(T − t_i − t_f))³, rounded down, at every step."""
    steps = range(s.total_steps + 2)
    assert [s.cubic(t) for t in steps] == [paper_budget(s, t) for t in steps]


@given(schedules())
def test_the_budget_changes_at_allocations_only(s: Schedule) -> None:
    """A loop over all steps that takes b(t) at each allocation has the same budget, which is final from T − t_f on."""
    in_force = s.initial
    for t in range(s.total_steps + 3):
        if t in paper_allocations(s):
            in_force = paper_budget(s, t)
        assert s.budget(t) == in_force
        assert s.is_final(t) == (t >= s.total_steps - s.t_final)
    assert s.final_step == s.total_steps - s.t_final


@given(schedules(), st.lists(st.integers(1, 9), max_size=30))
def test_the_allocations_of_a_walk_spend_the_budget_and_end_with_the_final_one(s: Schedule, jumps: list[int]) -> None:
    """However step numbers jump, each allocation spends b(t) of the last t in the gap, and only one is final."""
    steps = [0, *itertools.accumulate([*jumps, s.total_steps, 100])]
    found = [s.allocation(previous, step) for previous, step in itertools.pairwise(steps)]
    for (previous, step), allocation in zip(itertools.pairwise(steps), found, strict=True):
        inside = [t for t in paper_allocations(s) if previous < t <= step]
        assert s.due(previous, step) == max(inside, default=None)
        assert (allocation is None) == (not inside)
        if allocation is not None:
            assert allocation == Allocation(paper_budget(s, inside[-1]), final=inside[-1] == s.final_step)
    assert [allocation for allocation in found if allocation and allocation.final] == [s.final_allocation]


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
