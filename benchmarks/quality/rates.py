"""The search for a method's learning rate, on validation rows."""

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
    """The learning rates to try first. At the same rate, ΔW moves farther if there are more triplets."""
    least = _LEAST.get(run.method)
    if least is None:
        least = 1e-3 if run.rank < 8 else 5e-4
        if TASKS[run.task].targets != BERT:
            least *= 2
    return (2 * least, 4 * least, least)


def next_runs(run: Run, rows: Sequence[Row], *, by_all_seeds: bool = False) -> list[Run]:
    """The next runs that the search for the best learning rate of ``run``'s method needs, after ``rows``.

    The first seed tries three rates. While the best is at an edge, it tries twice or half of it. Then the other seeds
    run at the best rate. With ``by_all_seeds`` they also run at its two neighbours, and beyond while the best mean of
    all seeds is at an edge: one seed varies more than neighbouring rates differ.
    """
    own = [row for row in rows if row["seed"] == SEEDS[0]]
    tried = {row["learning_rate"] for row in own}
    missing = [rate for rate in first_rates(run) if rate not in tried]
    if missing:
        return [attrs.evolve(run, learning_rate=rate, seed=SEEDS[0]) for rate in missing]
    rate = max(own, key=points_of)["learning_rate"]
    if rate in (max(tried), min(tried)):
        beyond = 2 * rate if rate == max(tried) else rate / 2
        return [attrs.evolve(run, learning_rate=beyond, seed=SEEDS[0])]
    if not by_all_seeds:
        return [attrs.evolve(run, learning_rate=rate, seed=seed) for seed in SEEDS[1:]]
    done = {(row["learning_rate"], row["seed"]) for row in rows}
    between = [rate / 2, rate, 2 * rate]
    while True:
        wanted = [attrs.evolve(run, learning_rate=each, seed=seed) for each in between for seed in SEEDS]
        if not {(each.learning_rate, each.seed) for each in wanted} <= done:
            return wanted
        found = best(row for row in rows if row["learning_rate"] in between).rate
        if found == between[0]:
            between = [found / 2, *between]
        elif found == between[-1]:
            between = [*between, 2 * found]
        else:
            return wanted


def rate_of(run: Run, rows: Sequence[Row], *, by_all_seeds: bool = False) -> float | None:
    """The best learning rate of ``run``'s method, if ``rows`` contain every run of the search; otherwise None."""
    done = {(row["learning_rate"], row["seed"]) for row in rows}
    wanted = {(each.learning_rate, each.seed) for each in next_runs(run, rows, by_all_seeds=by_all_seeds)}
    if not wanted <= done:
        return None
    rates = {rate for rate, _ in wanted}
    return best(row for row in rows if row["learning_rate"] in rates).rate
