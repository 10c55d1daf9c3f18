"""The budget schedule b(t): which budget is in force at a step, and at which steps it is allocated."""

import math
from fractions import Fraction

import attrs

from tunerkit.errors import ConfigError

# Below, the scores of the last allocation are averages over at most five gradients, of which the first is that of an
# adapter at its start, where P or Λ is 0: triplets would be kept by chance.
LEAST_STEPS = 6


@attrs.frozen
class Allocation:
    """One allocation: the budget ``keep`` to spend, and whether the ranks are ``final`` after it."""

    keep: int
    final: bool


@attrs.frozen
class Schedule:
    """b(t) of the paper (section 3.3): b(0) until t_i, cubic down to b(T) at T − t_f, constant from there on.

    `plan` builds it and checks the values. Steps are counted from 1.

    Attributes:
        total_steps: T, in steps.
        t_init: t_i, in steps.
        t_final: t_f, in steps.
        delta_t: Δ_T, in steps.
        initial: b(0), in any unit.
        target: b(T), in the same unit.
    """

    total_steps: int
    t_init: int
    t_final: int
    delta_t: int
    initial: int
    target: int

    @property
    def final_step(self) -> int:
        """T − t_f, the step of the last allocation: from here on, ranks are final."""
        return self.total_steps - self.t_final

    def is_final(self, step: int) -> bool:
        """Whether ranks no longer change after ``step``."""
        return step >= self.final_step

    def cubic(self, t: int) -> int:
        """b(t) = b(T) + (b(0) − b(T))·(1 − (t − t_i)/(T − t_i − t_f))³, rounded down (the intent of Eq. 14).

        Both public implementations cube a float. The result may be just below a whole number, and lose one unit. Here
        the cube is a ratio of integers, so the rounding is exact for every budget and length.
        """
        if t <= self.t_init:
            return self.initial
        if self.is_final(t):
            return self.target
        descent = self.final_step - self.t_init
        left = self.final_step - t
        return self.target + (self.initial - self.target) * left**3 // descent**3

    def due(self, previous: int, step: int) -> int | None:
        """Return the last allocation step in (``previous``, ``step``], or None.

        A range is searched because hooks may not fire at every step. Allocation steps are the multiples of Δ_T between
        t_i and T − t_f, and T − t_f itself.
        """
        if previous < self.final_step <= step:
            return self.final_step
        last = min(step, self.final_step)
        last -= last % self.delta_t
        return last if last > max(previous, self.t_init) else None

    def allocation(self, previous: int, step: int) -> Allocation | None:
        """Return the allocation that is `due` in (``previous``, ``step``], or None."""
        t = self.due(previous, step)
        return None if t is None else Allocation(self.cubic(t), final=self.is_final(t))

    @property
    def final_allocation(self) -> Allocation:
        """The allocation at T − t_f."""
        return Allocation(self.target, final=True)

    def budget(self, step: int) -> int:
        """Return the budget in force after ``step``: b(t) of the last allocation step t ≤ ``step``, else b(0)."""
        last = self.due(0, step)
        return self.initial if last is None else self.cubic(last)


def is_short(schedule: Schedule) -> bool:
    """Whether a training prunes triplets, but has too few steps to choose them by their scores."""
    return schedule.target < schedule.initial and schedule.total_steps < LEAST_STEPS


def refuse_short(schedule: Schedule) -> None:
    """Reject a training with too few steps to choose which triplets to prune.

    Args:
        schedule: The schedule.

    Raises:
        ConfigError: There are too few steps.
    """
    if is_short(schedule):
        raise ConfigError(
            [
                f"AdaLoRA: expected at least {LEAST_STEPS} steps, got {schedule.total_steps}: scores from so few "
                "gradients are too noisy to choose what to prune; train for more epochs or in smaller batches, use "
                "method 'lora', or prune nothing: set init_rank to target_rank @ $.total_steps"
            ]
        )


def plan(
    *,
    total_steps: int,
    t_init: int | float,
    t_final: int | float,
    delta_t: int,
    initial: int,
    target: int,
    prunes: bool = True,
    initial_field: str = "init_rank",
    target_field: str = "target_rank",
) -> Schedule:
    """Check the settings of a schedule, and build it.

    Args:
        total_steps: T, in optimizer steps.
        t_init: t_i, in steps (int) or as a share of T (float below 1, rounded down to steps).
        t_final: t_f, given like t_i.
        delta_t: Δ_T, in steps.
        initial: b(0), in any unit.
        target: b(T), in the same unit.
        prunes: Whether anything is left to prune. If not, t_i + t_f may exceed T; both are then set to 0.
        initial_field: The config field for errors about ``initial``.
        target_field: The config field for errors about ``target``.

    Returns:
        The schedule.

    Raises:
        ConfigError: With one line for each problem.
    """
    problems = [
        *_length_problems(total_steps, t_init, t_final, delta_t, prunes=prunes),
        *_budget_problems(initial, target, initial_field, target_field),
    ]
    if problems:
        raise ConfigError(problems)
    first, last = _steps(t_init, total_steps), _steps(t_final, total_steps)
    fits = first + last < total_steps
    return Schedule(
        total_steps=total_steps,
        t_init=first if fits else 0,
        t_final=last if fits else 0,
        delta_t=delta_t,
        initial=initial,
        target=target,
    )


def _steps(span: int | float, total_steps: int) -> int:
    if isinstance(span, int):
        return span
    # 0.29 is meant as 29/100 and 1/3 as one third: the float nearest to either can fall a whole step short.
    return math.floor(Fraction(span).limit_denominator(10**9) * total_steps)


def _size_problems(name: str, value: int, advice: str) -> list[str]:
    return [] if value > 0 else [f"expected at least 1, got {value}; {advice} @ $.{name}"]


def _span_problems(name: str, span: int | float) -> list[str]:
    if isinstance(span, int):
        return [] if span >= 0 else [f"expected 0 or more steps, got {span} @ $.{name}"]
    if 0 <= span < 1:
        return []
    advice = f"; write {int(span)} for steps" if math.isfinite(span) and span >= 1 else ""
    return [f"a float is a share of training and must be at least 0 and below 1, got {span}{advice} @ $.{name}"]


def _budget_problems(initial: int, target: int, initial_field: str, target_field: str) -> list[str]:
    if target <= 0:
        return [f"the target budget must be above 0, got {target}; to train nothing, wrap nothing @ $.{target_field}"]
    if target > initial:
        return [
            f"the target budget {target} is above the initial budget {initial}, but a budget "
            f"only falls; lower {target_field} or raise {initial_field} @ $.{target_field}"
        ]
    return []


def _length_problems(
    total_steps: int, t_init: int | float, t_final: int | float, delta_t: int, *, prunes: bool
) -> list[str]:
    """Return the problems of each length; without any, the problem that t_i and t_f leave no steps for pruning."""
    total = _size_problems("total_steps", total_steps, "set total_steps to the number of optimizer steps")
    between = _size_problems("delta_t", delta_t, "set the number of steps between two allocations")
    spans = [*_span_problems("t_init", t_init), *_span_problems("t_final", t_final)]
    room = [] if total or spans or not prunes else _room_problems(total_steps, t_init, t_final)
    return [*total, *between, *spans, *room]


def _room_problems(total_steps: int, t_init: int | float, t_final: int | float) -> list[str]:
    first, last = _steps(t_init, total_steps), _steps(t_final, total_steps)
    if first + last < total_steps:
        return []
    return [
        f"t_init ({first} steps) and t_final ({last} steps) leave no room for pruning in {total_steps} "
        "steps; shorten one of them or train longer @ $.t_init"
    ]
