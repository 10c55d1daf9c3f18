"""The runs that are made together, by name."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence

import attrs

from benchmarks.quality import methods
from benchmarks.quality.runs import Run
from benchmarks.quality.scores import best
from benchmarks.quality.store import Row
from benchmarks.quality.tasks import BERT, TASKS

SEEDS = (0, 1, 2)
# The ends of the curve come first: they say whether a task has headroom.
ENDS, BETWEEN = (1, 8), (2, 4, 16)


def first_rates(task: str, rank: int) -> tuple[float, float, float]:
    """The learning rates that are tried at first; ΔW moves farther at one rate where there are more triplets."""
    least = 1e-3 if rank < 8 else 5e-4
    if TASKS[task].targets != BERT:
        least *= 2
    return (2 * least, 4 * least, least)


def next_runs(run: Run, rows: Sequence[Row], seeds: Sequence[int]) -> list[Run]:
    """What to run next to know ``run``'s method at its best learning rate, if ``rows`` are what it has made so far.

    The first seed at three rates; while the best of them is the highest or the lowest, at twice or half of it; then
    the other seeds at the best.
    """
    own = [row for row in rows if row["seed"] == seeds[0]]
    tried = {row["learning_rate"] for row in own}
    missing = [rate for rate in first_rates(run.task, run.rank) if rate not in tried]
    if missing:
        return [attrs.evolve(run, learning_rate=rate, seed=seeds[0]) for rate in missing]
    rate = best(own).rate
    if rate in (max(tried), min(tried)):
        beyond = 2 * rate if rate == max(tried) else rate / 2
        return [attrs.evolve(run, learning_rate=beyond, seed=seeds[0])]
    return [attrs.evolve(run, learning_rate=rate, seed=seed) for seed in seeds[1:]]


def headroom(rows: Sequence[Row]) -> list[Run]:
    """Our LoRA over ranks, on validation rows alone: what a task's score gains from rank at all."""
    made: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        made[row["task"], row["rank"]].append(row)
    return [
        run
        for ranks in (ENDS, BETWEEN)
        for task, rank in itertools.product(TASKS, ranks)
        for run in next_runs(Run(task, methods.LORA, rank, 0.0, 0), made[task, rank], SEEDS)
    ]


GRIDS: dict[str, Callable[[Sequence[Row]], list[Run]]] = {"headroom": headroom}
