"""Statistics of rows: the best learning rate, and differences with their intervals."""

import math
from collections.abc import Iterable, Mapping, Sequence

import attrs
import numpy as np
from numpy.typing import NDArray

from benchmarks.quality.store import Row
from tunerkit_cli.sweeping.statistics import interval_of_mean

Floats = NDArray[np.float64]


@attrs.frozen(eq=False)
class Cell:
    """Accuracies in points at one learning rate; seeds in their order."""

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


def points_of(row: Row, part: str = "validation") -> float:
    """A row's accuracy on a part, in points (percent)."""
    return 100 * float(row[part]["accuracy"])


def percent_over(loss: float | None, other: float | None) -> float:
    """A loss relative to another, in percent; not a number if a training diverged."""
    return math.nan if loss is None or other is None else 100 * (loss / other - 1)


def best(rows: Iterable[Row]) -> Cell:
    """The validation accuracies at the best rate by mean, among rates with the most seeds; the lowest wins a tie."""
    by_rate: dict[float, dict[int, float]] = {}
    for row in rows:
        by_rate.setdefault(row["learning_rate"], {})[row["seed"]] = points_of(row)
    most = max(map(len, by_rate.values()))
    whole = {rate: found for rate, found in sorted(by_rate.items()) if len(found) == most}
    # Rounded: two means of equally many right answers are a tie, whatever their floating-point sums.
    return _cell(*max(whole.items(), key=lambda item: round(float(np.mean(list(item[1].values()))), 6)))


def at_rate(rows: Iterable[Row], rate: float, part: str = "test") -> Cell | None:
    """The accuracies on a part at ``rate``; None if there are no rows."""
    found = {row["seed"]: points_of(row, part) for row in rows if row["learning_rate"] == rate}
    return _cell(rate, found) if found else None


def _cell(rate: float, by_seed: Mapping[int, float]) -> Cell:
    seeds = tuple(sorted(by_seed))
    return Cell(rate, seeds, np.array([by_seed[seed] for seed in seeds]))


def paired(top: Cell, bottom: Cell) -> Floats:
    """The differences at the seeds that both have."""
    shared = sorted({*top.seeds} & {*bottom.seeds})
    return np.array([top.points[top.seeds.index(seed)] - bottom.points[bottom.seeds.index(seed)] for seed in shared])


def interval(differences: Sequence[Floats]) -> tuple[float, float]:
    """The 95 % interval of the mean over tasks, as if they were drawn from many like them; of one task, over its seeds.

    Of several tasks each is one value, and the seeds within them are part of its spread.
    """
    return interval_of_mean(_values(differences))


def told(differences: Sequence[Floats], *, digits: int = 2) -> str:
    """The mean of the tasks' means, and `interval` in brackets where it is over three values or more.

    Empty if there is no task, or a task without a seed: an unfinished grid gets no numbers.
    """
    if not differences or not all(map(len, differences)):
        return ""
    values = _values(differences)
    mean = f"{float(values.mean()):+.{digits}f}"
    if len(values) < 3:
        return mean
    return f"{mean} [{', '.join(f'{end:+.{digits}f}' for end in interval(differences))}]"


def _values(differences: Sequence[Floats]) -> Floats:
    """What an interval is over: one task's differences, or the means of several."""
    return differences[0] if len(differences) == 1 else np.array([each.mean() for each in differences])
