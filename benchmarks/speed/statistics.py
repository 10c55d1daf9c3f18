"""Typical values and their bootstrap intervals, from rounds in which all contenders took part."""

from collections.abc import Sequence

import attrs
import numpy as np
from numpy.typing import NDArray

from benchmarks.speed.settings import DRAWS

Floats = NDArray[np.float64]
Kinds = NDArray[np.int64]

_LEVEL = 0.95


@attrs.frozen
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


@attrs.frozen(eq=False)
class Pairs:
    """Two values of each round, (rounds,) each, and each round's kind: mask steps are a separate kind."""

    top: Floats
    bottom: Floats
    kinds: Kinds


def median(values: Floats) -> float:
    """The median; not a number if there was no such round."""
    return float(np.median(values)) if len(values) else float("nan")


def typical(values: Floats, kinds: Kinds) -> Floats:
    """The median of each kind of round, weighted by the kind's share; over the last axis, (..., rounds) to (...).

    A plain median would ignore the mask steps, one in ten. A mean would include every disturbance of the machine.
    """
    found = [np.mean(kinds == kind) * np.median(values[..., kinds == kind], axis=-1) for kind in np.unique(kinds)]
    total: Floats = np.sum(found, axis=0)
    return total


def ratio(pairs: Pairs, *, seed: int, draws: int = DRAWS) -> Estimate:
    """typical(top) / typical(bottom) with its percentile interval over rounds resampled within their kinds."""
    return geometric_mean([pairs], seed=seed, draws=draws)


def geometric_mean(several: Sequence[Pairs], *, seed: int, draws: int = DRAWS) -> Estimate:
    """The geometric mean of several ratios, each with its rounds resampled separately."""
    generator = np.random.default_rng(seed)
    value = np.exp(_mean([_log_ratio(pairs, np.arange(len(pairs.top))) for pairs in several]))
    drawn = [_log_ratio(pairs, _draw(pairs.kinds, draws, generator)) for pairs in several]
    low, high = _bounds(np.exp(_mean(drawn)))
    return Estimate(float(value), low, high)


def _mean(logs: Sequence[Floats]) -> Floats:
    """The mean over the first axis; infinite where one of the values is, whatever the others are."""
    with np.errstate(invalid="ignore"):
        mean: Floats = np.where(np.isposinf(logs).any(axis=0), np.inf, np.mean(logs, axis=0))
    return mean


def middle(values: Floats, kinds: Kinds, *, seed: int, draws: int = DRAWS) -> Estimate:
    """typical(values) with its percentile interval."""
    chosen = _draw(kinds, draws, np.random.default_rng(seed))
    low, high = _bounds(typical(values[chosen], kinds))
    return Estimate(float(typical(values, kinds)), low, high)


def one_kind(rounds: int) -> Kinds:
    """Rounds of a single kind."""
    return np.zeros(rounds, dtype=np.int64)


def _log_ratio(pairs: Pairs, chosen: NDArray[np.int64]) -> Floats:
    """The logarithm of the ratio: -inf if the top's overhead is not positive, +inf if the bottom's is not."""
    top, bottom = typical(pairs.top[chosen], pairs.kinds), typical(pairs.bottom[chosen], pairs.kinds)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.log(np.maximum(top, 0.0)) - np.log(np.maximum(bottom, 0.0))
    logs: Floats = np.where(bottom > 0, found, np.inf)
    return logs


def _draw(kinds: Kinds, draws: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Round numbers, (draws, rounds), each drawn from the rounds of the kind that it replaces."""
    chosen = np.empty((draws, len(kinds)), dtype=np.int64)
    for kind in np.unique(kinds):
        places = np.flatnonzero(kinds == kind)
        chosen[:, places] = generator.choice(places, size=(draws, len(places)))
    return chosen


def _bounds(drawn: Floats) -> tuple[float, float]:
    # Only observed values: interpolation between two infinite ones is undefined.
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(drawn, tail, method="lower"), np.quantile(drawn, 1 - tail, method="higher")
    return float(low), float(high)
