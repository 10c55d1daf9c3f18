"""Differences of runs on the same held-out rows: their intervals, the winner, and how many more seeds would tell.

A result depends on the seeds and on the rows, and both are drawn: other seeds and other rows would give another
difference. All seeds of a contender are scored on the same rows, so the scores (seeds, rows) are crossed, and an
interval over seeds alone, or over rows alone, is too narrow. Here the variances of both are estimated from one analysis
of variance without repetition (Cornfield and Tukey, 1956), and their sum has the degrees of freedom of Satterthwaite
(1946).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Final

import attrs
import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL: Final = 0.95
_MOST_SEEDS: Final = 1000  # more than anybody trains
_GROWTH: Final = 1.25
_MOST_STEPS: Final = 40  # 6,000 times as many rows

Scores = NDArray[np.float64]  # (seeds, rows): of each held-out row, in the unit of the difference


@attrs.frozen
class Difference:
    """The mean difference of two contenders, with its confidence interval.

    Attributes:
        mean: The first contender's mean score minus the second's.
        low: The interval's lower end; minus infinity for one seed.
        high: The upper end.
        of_seeds: The variance between seeds, of one seed's mean over all rows; without the part from rows.
        of_rows: The variance between rows, of one row's mean over all seeds; without the part from seeds.
        of_both: The variance that is left: of one row in one seed.
        seeds: How many seeds.
        rows: How many rows.
        level: The share of all experiments whose interval holds the true difference.
    """

    mean: float
    low: float
    high: float
    of_seeds: float
    of_rows: float
    of_both: float
    seeds: int
    rows: int
    level: float

    @property
    def is_told(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def difference(first: Scores, second: Scores, *, level: float = LEVEL) -> Difference:
    """Compare two contenders on the same rows.

    Args:
        first: The scores of the one, (seeds, rows).
        second: The scores of the other; its seeds may be others, and are paired in their order.
        level: The share of all experiments whose interval holds the true difference.

    Returns:
        The difference. With one seed it has no interval.

    Raises:
        ValueError: The shapes differ, or there are fewer than two rows.
    """
    if first.shape != second.shape or first.ndim != 2 or first.shape[1] < 2:
        raise ValueError(f"scores of shapes {first.shape} and {second.shape}: expected (seeds, rows) twice, rows >= 2")
    each = first - second
    seeds, rows = each.shape
    mean = float(each.mean())
    if seeds == 1:
        return Difference(mean, -math.inf, math.inf, math.nan, math.nan, math.nan, seeds, rows, level)
    by_seed, by_row = each.mean(axis=1), each.mean(axis=0)
    left = each - by_seed[:, None] - by_row[None, :] + mean
    # Mean squares: of each, the expected value is that of the rest plus its own variance, times what it is a mean of.
    square_seeds = rows * float(((by_seed - mean) ** 2).sum()) / (seeds - 1)
    square_rows = seeds * float(((by_row - mean) ** 2).sum()) / (rows - 1)
    square_left = float((left**2).sum()) / ((seeds - 1) * (rows - 1))
    of_seeds = max(0.0, (square_seeds - square_left) / rows)
    of_rows = max(0.0, (square_rows - square_left) / seeds)
    variance, freedom = _variance(square_seeds, square_rows, square_left, seeds, rows)
    half = _half_width(variance, freedom, level)
    return Difference(mean, mean - half, mean + half, of_seeds, of_rows, square_left, seeds, rows, level)


def interval_of_mean(values: NDArray[np.float64], *, level: float = LEVEL) -> tuple[float, float]:
    """Return the ends of the confidence interval of a mean, by Student's t.

    It holds its level for few values too, if they are about normal.

    Args:
        values: Independent values, (n,), of at least two.
        level: The share of all experiments whose interval holds the true mean.
    """
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))
    half = _half_width(error**2, len(values) - 1, level)
    return mean - half, mean + half


def _half_width(variance: float, freedom: float, level: float) -> float:
    """Return half the width of the interval of a mean with this variance."""
    return float(stats.t.ppf((1 + level) / 2, freedom)) * math.sqrt(variance) if variance else 0.0


def _variance(
    square_seeds: float, square_rows: float, square_left: float, seeds: int, rows: int
) -> tuple[float, float]:
    """Return the variance of the mean difference, and its degrees of freedom, from the mean squares.

    A mean square that is below what is left is taken for that: few seeds often look alike by chance, and keep their few
    degrees of freedom then.
    """
    square_seeds, square_rows = max(square_seeds, square_left), max(square_rows, square_left)
    together = square_seeds + square_rows - square_left
    if together == 0:
        return 0.0, 1.0
    spread = square_seeds**2 / (seeds - 1) + square_rows**2 / (rows - 1)
    spread += square_left**2 / ((seeds - 1) * (rows - 1))
    return together / (seeds * rows), max(together**2 / spread, float(min(seeds, rows) - 1))


def seeds_to_tell(found: Difference) -> int | None:
    """Return how many seeds in all, more than there are, would tell a difference as large as the one found.

    Returns:
        The number; None if no number of seeds would, because the rows are too few, or the seeds too few to estimate.
    """
    if found.seeds == 1 or found.mean == 0:
        return None
    return next((n for n in range(found.seeds + 1, _MOST_SEEDS + 1) if _would_tell(found, n, found.rows)), None)


def rows_to_tell(found: Difference) -> int | None:
    """Return how many rows, roughly, would tell such a difference with as many seeds; None as above."""
    if found.seeds == 1 or found.mean == 0:
        return None
    numbers = (math.ceil(found.rows * _GROWTH**step) for step in range(1, _MOST_STEPS))
    return next((rows for rows in numbers if _would_tell(found, found.seeds, rows)), None)


def _would_tell(found: Difference, seeds: int, rows: int) -> bool:
    """Whether the expected mean squares of so many seeds and rows tell the difference."""
    square_seeds, square_rows = (
        found.of_both + rows * found.of_seeds,
        found.of_both + seeds * found.of_rows,
    )
    variance, freedom = _variance(square_seeds, square_rows, found.of_both, seeds, rows)
    return _half_width(variance, freedom, found.level) < abs(found.mean)


@attrs.frozen
class Outcome:
    """What can be said of contenders.

    Attributes:
        best: The name of the one to take.
        differences: The best one minus each other, at the level that holds for all of them together.
    """

    best: str
    differences: Mapping[str, Difference]

    @property
    def level_with(self) -> list[str]:
        """The others that cannot be told from the best."""
        return [name for name, each in self.differences.items() if not each.is_told]

    @property
    def is_told(self) -> bool:
        """Whether the best is told from all others."""
        return bool(self.differences) and not self.level_with


def outcome(chosen: str, scores: Mapping[str, Scores], *, level: float = LEVEL) -> Outcome:
    """Compare the contender that was chosen on other rows with all others.

    Args:
        chosen: Its name. Chosen on the same rows, it would have the luck of these rows on its side.
        scores: The scores (seeds, rows) by name; `chosen` among them.
        level: How often no difference is told that is none, over all comparisons (Bonferroni).

    Returns:
        The outcome.
    """
    others: Sequence[str] = [name for name in scores if name != chosen]
    of_each = 1 - (1 - level) / max(1, len(others))
    return Outcome(chosen, {name: difference(scores[chosen], scores[name], level=of_each) for name in others})
