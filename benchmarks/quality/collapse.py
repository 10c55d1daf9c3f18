"""How far the default learning rate stands below collapse, before and after the command's values were changed."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np

from benchmarks.quality import methods
from benchmarks.quality.runs import Run
from benchmarks.quality.scores import points_of, told
from benchmarks.quality.store import Row

# Tasks on which rows of earlier grids show collapses, in text and in images; bf16, which this is slow in without AMX,
# runs on the first ones alone.
TASKS: tuple[str, ...] = ("movie-2", "nyt-3", "tweets-3", "cifar-10", "digits-10/pwl")
FEW: tuple[str, ...] = TASKS[:2]
RANK = 8
# The tasks for whose kind, images and tags, the command's default has become a higher rate than for texts.
FASTER: tuple[str, ...] = ("fashion-10", "cifar-10", "digits-10", "digits-10/pwl", "brown-tags")
MULTIPLES = (1, 2, 4)
SEEDS, FEW_SEEDS = tuple(range(6)), tuple(range(3))
METHODS = (methods.LORA, methods.ADALORA)


@attrs.frozen
class Defaults:
    """What a run has that sets nothing: the rates, and what differs of the recipe and of AdaLoRA's settings."""

    rate: float = 1e-3
    faster: float = 1e-3  # of `FASTER`
    training: Mapping[str, Any] = attrs.field(factory=dict)
    adalora: Mapping[str, Any] = attrs.field(factory=dict)

    def run(self, task: str, method: str, multiple: float, seed: int, precision: str = "fp32") -> Run:
        """The run at a multiple of the default rate."""
        training = {**self.training, **({"precision": precision} if precision != "fp32" else {})}
        settings = self.adalora if method == methods.ADALORA else {}
        rate = self.faster if task in FASTER else self.rate
        return Run(task, method, RANK, multiple * rate, seed, settings, training=training)


BEFORE = Defaults()
AFTER = Defaults(1e-3, 2e-3, {"warmup": 0.1, "beta2": 0.95, "clip": 0.3}, {"alpha": 16.0})


def collapse_runs() -> Iterator[Run]:
    """Runs at one, two and four times the default rate. Those that say most come first."""
    for seed in SEEDS:
        for defaults in (AFTER, BEFORE):
            for multiple in (2, 4, 1):
                for task in TASKS:
                    for precision in _precisions(task) if seed in FEW_SEEDS else ("fp32",):
                        for method in METHODS:
                            yield defaults.run(task, method, multiple, seed, precision)


def default_runs(tasks: Sequence[str]) -> Iterator[Run]:
    """Runs at the default rate on more tasks: what the change costs or gains where nothing collapses."""
    for seed in FEW_SEEDS:
        for task in tasks:
            for method in METHODS:
                for defaults in (AFTER, BEFORE):
                    yield defaults.run(task, method, 1, seed)


def is_collapsed(row: Row, rows: Sequence[Row]) -> bool:
    """Whether a run is nearer to naming the most frequent class alone than to the best run of its task in ``rows``."""
    own = [each for each in rows if each["task"] == row["task"]]
    chance: float | None = next((100 * each["majority"] for each in own if "majority" in each), None)
    if chance is None:
        raise ValueError(f"{row['task']}: no row says how frequent its most frequent class is; run the grid collapse")
    return points_of(row) < (chance + max(map(points_of, own))) / 2


def collapse_table(rows: Sequence[Row]) -> list[str]:
    """Collapsed runs of all runs, by task, precision and method, at each multiple of the default rate."""
    shown = [f"{multiple} x" for multiple in MULTIPLES]
    head = [*(f"before, {each}" for each in shown), *(f"after, {each}" for each in shown)]
    lines = [f"| task | precision | method | {' | '.join(head)} |", f"|---|---|---|{'---:|' * len(head)}"]
    for task in TASKS:
        for precision in _precisions(task):
            for method in METHODS:
                asked = [
                    defaults.run(task, method, each, 0, precision) for defaults in (BEFORE, AFTER) for each in MULTIPLES
                ]
                cells = [_share([row for row in rows if _is_of(row, run)], rows) for run in asked]
                lines.append(f"| {task} | {precision} | {methods.NAMES[method]} | {' | '.join(cells)} |")
    return lines


def default_table(rows: Sequence[Row], tasks: Sequence[str]) -> list[str]:
    """Validation accuracy at the default rate, after minus before, paired by seed, with the interval over tasks."""
    lines = ["| task | LoRA | AdaLoRA |", "|---|---:|---:|"]
    found: dict[str, list[Any]] = {method: [] for method in METHODS}
    for task in tasks:
        cells = []
        for method in METHODS:
            before, after = (
                {row["seed"]: points_of(row) for row in rows if _is_of(row, defaults.run(task, method, 1, 0))}
                for defaults in (BEFORE, AFTER)
            )
            differences = np.array(
                [after[seed] - before[seed] for seed in FEW_SEEDS if {seed} <= before.keys() & after.keys()]
            )
            found[method].append(differences)
            cells.append(told([differences]))
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return [*lines, f"| mean | {' | '.join(told(found[method]) for method in METHODS)} |"]


def _precisions(task: str) -> tuple[str, ...]:
    return ("fp32", "bf16") if task in FEW else ("fp32",)


def _is_of(row: Row, run: Run) -> bool:
    """Whether a row is of a run, at any seed; rows of earlier grids count too."""
    inputs = attrs.asdict(run, filter=attrs.filters.exclude("seed", "tested"))
    return all(row.get(name, {}) == value for name, value in inputs.items())


def _share(own: Sequence[Row], rows: Sequence[Row]) -> str:
    by_seed = {row["seed"]: is_collapsed(row, rows) for row in own if row["seed"] in SEEDS}
    return f"{sum(by_seed.values())}/{len(by_seed)}" if by_seed else ""
