"""How a method's learning rate is found, on validation rows."""

from collections.abc import Sequence

import attrs

from benchmarks.quality import methods
from benchmarks.quality.runs import Run
from benchmarks.quality.scores import best, points_of
from benchmarks.quality.store import Row
from benchmarks.quality.tasks import BERT, TASKS

SEEDS = (0, 1, 2)
_LEAST = {methods.HEAD_ONLY: 1e-2, methods.FULL: 2e-5}


def first_rates(run: Run) -> tuple[float, float, float]:
    """The learning rates that are tried at first; ΔW moves farther at one rate where there are more triplets."""
    least = _LEAST.get(run.method)
    if least is None:
        least = 1e-3 if run.rank < 8 else 5e-4
        if TASKS[run.task].targets != BERT:
            least *= 2
    return (2 * least, 4 * least, least)


def next_runs(run: Run, rows: Sequence[Row], *, finalists: int = 1) -> list[Run]:
    """What to run next to know ``run``'s method at its best learning rate, if ``rows`` are what it has made so far.

    The first seed at three rates; while the best of them is the highest or the lowest, at twice or half of it; then
    the other seeds at the best ``finalists``: one seed is off by more than two neighbouring rates are apart.
    """
    own = [row for row in rows if row["seed"] == SEEDS[0]]
    tried = {row["learning_rate"] for row in own}
    missing = [rate for rate in first_rates(run) if rate not in tried]
    if missing:
        return [attrs.evolve(run, learning_rate=rate, seed=SEEDS[0]) for rate in missing]
    leading = [row["learning_rate"] for row in sorted(own, key=points_of, reverse=True)]
    rate = leading[0]
    if rate in (max(tried), min(tried)):
        beyond = 2 * rate if rate == max(tried) else rate / 2
        return [attrs.evolve(run, learning_rate=beyond, seed=SEEDS[0])]
    return [attrs.evolve(run, learning_rate=rate, seed=seed) for rate in leading[:finalists] for seed in SEEDS[1:]]


def rate_of(run: Run, rows: Sequence[Row], *, finalists: int = 1) -> float | None:
    """The best learning rate of ``run``'s method, once ``rows`` hold every run that finds it."""
    done = {(row["learning_rate"], row["seed"]) for row in rows}
    wanted = {(each.learning_rate, each.seed) for each in next_runs(run, rows, finalists=finalists)}
    if not wanted <= done:
        return None
    rates = {rate for rate, _ in wanted}
    return best(row for row in rows if row["learning_rate"] in rates).rate
