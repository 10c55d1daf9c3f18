"""Named grids: sets of runs that are executed together."""

import math
from collections.abc import Callable, Mapping, Sequence

import attrs

from benchmarks.quality import ablation, collapse, contest, methods
from benchmarks.quality.rates import SEEDS, next_runs, rate_of
from benchmarks.quality.runs import Run
from benchmarks.quality.store import Row
from benchmarks.quality.tasks import CURVES

# The ends of the curve run first: they show whether a task has headroom.
ENDS, BETWEEN = (1, 8), (2, 4, 16)
# Fixed before AdaLoRA ran on these tasks as they are now: with three seeds of the grid headroom, rank 8 is at least
# one point above rank 1.
HEADROOM: tuple[str, ...] = ("fashion-10", "cifar-10", "nyt-3", "amazon-3/qv", "digits-10/pwl")
# The headroom of this task showed with three seeds that ran after the list above and the contest. The comparison at
# rank 1 runs on it too, and tables count it separately.
LATER: tuple[str, ...] = ("amazon-3",)
# The defaults were to be chosen on these tasks and confirmed on the other two. Those have been scored since
# (docs/evidence/quality-record.md).
ABLATED: tuple[str, ...] = ("fashion-10", "cifar-10", "nyt-3")
COMPARED: tuple[str, ...] = (*HEADROOM, "brown-tags", "wordnet-41", "movie-2", *LATER, "tweets-3", "digits-10")

GENERATION_RATES = (1e-3, 4e-3)

Rows = Mapping[str, Sequence[Row]]  # the existing rows, by the name of their grid


def headroom(rows: Rows) -> list[Run]:
    """Our LoRA over ranks, on validation rows only: how much a task's score gains from rank."""
    runs, further = [], []
    for task in CURVES:
        ends = [Run(task, methods.LORA, rank, 0.0, 0) for rank in ENDS]
        runs += [run for end in ends for run in next_runs(end, made_for(end, rows, "headroom"))]
        known = [rate for end in ends if (rate := rate_of(end, made_for(end, rows, "headroom"))) is not None]
        if len(known) == len(ENDS):
            further += [run for rank in BETWEEN for run in between(Run(task, methods.LORA, rank, 0.0, 0), known)]
    return runs + further


def between(run: Run, rates: Sequence[float]) -> list[Run]:
    """Runs of one rank at the best rates of both ends (``rates``) and the rates between them.

    A rank beyond the ends runs at the lower of these rates and at half of it. One seed is enough: these runs only draw
    the curve and decide nothing.
    """
    low, high = min(rates), max(rates)
    if run.rank > max(ENDS):
        low, high = low / 2, low
    tried = [low * 2**power for power in range(round(math.log2(high / low)) + 1)]
    return [attrs.evolve(run, learning_rate=rate, seed=SEEDS[0]) for rate in tried]


def ablation_runs(rows: Rows) -> list[Run]:
    """AdaLoRA with one setting changed at a time, at LoRA's best rate on validation rows."""
    return ablation.ablation({task: _lora_rate(task, ablation.RANK, rows) for task in _fixed(ABLATED)})


def rates(rows: Rows) -> list[Run]:
    """The runs that find the learning rates of the contest. They include LoRA: its headroom runs are not all fp32."""
    return [
        run
        for task, entries in _compared().items()
        for entry in entries
        for asked in [Run(task, entry.method, entry.rank, 0.0, 0)]
        for run in next_runs(asked, made_for(asked, rows), by_all_seeds=True)
    ]


def contest_runs(rows: Rows) -> list[Run]:
    """The methods on test rows, each as soon as its learning rate is known."""
    return contest.contest(_compared(), lambda run: made_for(run, rows))


def generation(_: Rows) -> list[Run]:
    """LoRA and both AdaLoRAs on the language model, at two rates."""
    return [
        Run("definitions", method, contest.LOWEST, rate, seed, tested=True)
        for seed in contest.SEEDS[:3]
        for rate in GENERATION_RATES
        for method in methods.NAMES
    ]


def collapse_runs(_: Rows) -> list[Run]:
    """LoRA and AdaLoRA at one, two and four times the default rate, before and after a change of training."""
    return [*collapse.collapse_runs()]


def default_runs(_: Rows) -> list[Run]:
    """LoRA and AdaLoRA at the default rate on all compared tasks, before and after."""
    return [*collapse.default_runs(COMPARED)]


def made_for(run: Run, rows: Rows, grid: str = "rates") -> list[Row]:
    """A grid's validation rows of a run's method and rank, which choose its learning rate."""
    wanted = (run.task, run.method, run.rank)
    return [row for row in rows.get(grid, ()) if (row["task"], row["method"], row["rank"]) == wanted]


def rate_for(task: str, method: str, rank: int, rows: Rows) -> float | None:
    """A method's best learning rate on a task at a rank; None while it is unknown."""
    run = Run(task, method, rank, 0.0, 0)
    return rate_of(run, made_for(run, rows), by_all_seeds=True)


def _compared() -> dict[str, list[contest.Entry]]:
    return {
        task: [*contest.entries(task, has_headroom=task in HEADROOM, later=task in LATER)] for task in _fixed(COMPARED)
    }


def _fixed(tasks: tuple[str, ...]) -> tuple[str, ...]:
    if not tasks:
        raise ValueError("its tasks are not fixed yet: they follow from the grid headroom, and are listed in grids.py")
    return tasks


def _lora_rate(task: str, rank: int, rows: Rows) -> float:
    found = rate_for(task, methods.LORA, rank, rows)
    if found is None:
        raise ValueError(f"LoRA's learning rate on {task} at rank {rank} is not known yet; run the grid rates first")
    return found


# The further grids whose rows answer for runs of a grid: equal runs are made once.
ALSO_MADE: Mapping[str, tuple[str, ...]] = {"collapse": ("rates", "default"), "default": ("rates", "collapse")}

GRIDS: dict[str, Callable[[Rows], list[Run]]] = {
    "headroom": headroom,
    "ablation": ablation_runs,
    "rates": rates,
    "contest": contest_runs,
    "generation": generation,
    "collapse": collapse_runs,
    "default": default_runs,
}
