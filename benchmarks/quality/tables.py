"""Tables from rows."""

from collections.abc import Iterable, Sequence

import attrs
import numpy as np
from numpy.typing import NDArray

from benchmarks.quality.grids import HEADROOM_RANKS
from benchmarks.quality.store import Row

HEADROOM = 1.0  # points between the ranks 1 and 8, below which a curve counts as flat
_DRAWS = 10_000

Floats = NDArray[np.float64]


@attrs.frozen(eq=False)
class Cell:
    """Validation accuracies in points at the learning rate that is best on average; seeds in their order."""

    rate: float
    seeds: tuple[int, ...]
    points: Floats

    @property
    def mean(self) -> float:
        """Over seeds."""
        return float(self.points.mean())

    @property
    def error(self) -> float:
        """Standard error of the mean; not a number for one seed."""
        return float(self.points.std(ddof=1) / len(self.points) ** 0.5) if len(self.points) > 1 else float("nan")


def best(rows: Iterable[Row]) -> Cell:
    """The learning rate with the highest mean validation accuracy, of those with the most seeds."""
    by_rate: dict[float, dict[int, float]] = {}
    for row in rows:
        by_rate.setdefault(row["learning_rate"], {})[row["seed"]] = 100 * row["validation"]["accuracy"]
    most = max(map(len, by_rate.values()))
    whole = {rate: found for rate, found in by_rate.items() if len(found) == most}
    rate = max(whole, key=lambda rate: float(np.mean(list(whole[rate].values()))))
    seeds = tuple(sorted(whole[rate]))
    return Cell(rate, seeds, np.array([whole[rate][seed] for seed in seeds]))


def paired(top: Cell, bottom: Cell) -> Floats:
    """The differences at the seeds that both have."""
    shared = sorted({*top.seeds} & {*bottom.seeds})
    return np.array([top.points[top.seeds.index(seed)] - bottom.points[bottom.seeds.index(seed)] for seed in shared])


def interval(differences: Sequence[Floats]) -> tuple[float, float, float]:
    """The mean of the tasks' mean differences, with its 95 % bootstrap interval over tasks and over seeds within them.

    For few tasks or seeds the interval is too narrow: what was never seen is never drawn.
    """
    rng = np.random.default_rng(0)
    count = len(differences)
    # (task, place, draw): a task that is drawn for two places has other seeds at each.
    means = np.stack(
        [each[rng.integers(len(each), size=(count, _DRAWS, len(each)))].mean(axis=2) for each in differences]
    )
    chosen = rng.integers(count, size=(1, count, _DRAWS))
    low, high = np.quantile(np.take_along_axis(means, chosen, axis=0)[0].mean(axis=0), [0.025, 0.975])
    return float(np.mean([each.mean() for each in differences])), float(low), float(high)


def headroom_table(rows: Sequence[Row]) -> list[str]:
    """LoRA's validation accuracy by rank, and whether rank 8 is a point above rank 1."""
    lines = [
        f"| task | {' | '.join(f'r = {rank}' for rank in sorted(HEADROOM_RANKS))} | r = 8 − r = 1 | headroom |",
        f"|---|{'---:|' * (len(HEADROOM_RANKS) + 1)}---|",
    ]
    for task in dict.fromkeys(row["task"] for row in rows):
        cells = {
            rank: best(own)
            for rank in sorted(HEADROOM_RANKS)
            if (own := [row for row in rows if (row["task"], row["rank"]) == (task, rank)])
        }
        shown = [_shown(cells[rank]) if rank in cells else "" for rank in sorted(HEADROOM_RANKS)]
        if {1, 8} <= cells.keys():
            gain, low, high = interval([paired(cells[8], cells[1])])
            shown += [f"{gain:+.2f} [{low:+.2f}, {high:+.2f}]", "yes" if gain >= HEADROOM else "no"]
        else:
            shown += ["", ""]
        lines.append(f"| {task} | {' | '.join(shown)} |")
    return lines


def _shown(cell: Cell) -> str:
    return f"{cell.mean:.2f} ± {cell.error:.2f} ({cell.rate:g}, {len(cell.seeds)})"
