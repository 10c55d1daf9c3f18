"""An axis: the range that it shows, its ticks, and where a value lies on it."""

import math
from collections.abc import Iterable, Sequence
from typing import Final

import attrs

from tunerkit_cli.report import wording

_TINY: Final = 1e-100


@attrs.frozen
class Tick:
    """A labelled place on an axis, in percent of its length."""

    place: float
    text: str


@attrs.frozen
class Axis:
    """A range of values, linear or logarithmic."""

    low: float
    high: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """Return where a value lies, in percent of the axis's length."""
        low, high, at = (math.log(v) if self.is_log else v for v in (self.low, self.high, value))
        return 100 * (at - low) / (high - low)

    def ticks(self, wanted: int = 5) -> tuple[Tick, ...]:
        """Return about ``wanted`` ticks at round values."""
        values = _decades(self.low, self.high, wanted) if self.is_log else _round_values(self.low, self.high, wanted)
        return tuple(Tick(self.place(value), _text(value)) for value in values)


def fitted(values: Iterable[float], *, is_log: bool = False, from_zero: bool = False, room: float = 0.06) -> Axis:
    """Return the axis that shows all values, with some room beyond both ends; with ``from_zero`` it begins below 0."""
    found = list(values)
    low, high = min(found), max(found)
    if is_log:
        factor = (high / low) ** room if high > low else 2.0
        return Axis(low / factor, high * factor, is_log=True)
    low = min(low, 0.0) if from_zero else low
    scale = max(abs(low), abs(high))
    scale = scale if scale > _TINY else 1.0
    # Values that differ by rounding alone get the room of equal ones.
    margin = room * (high - low if high - low > 1e-9 * scale else scale)
    return Axis(low - margin, high + margin)


def _round_values(low: float, high: float, wanted: int) -> Sequence[float]:
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _decades(low: float, high: float, wanted: int) -> Sequence[float]:
    """Return powers of ten, or 1, 2 and 5 times these; fewer decades if there are many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, round((last - first) / wanted))
    for factors in ((1,), (1, 3), (1, 2, 5)):
        values = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
        inside = [value for value in values if low <= value <= high]
        if len(inside) >= 3:
            return inside
    return inside if len(inside) > 1 else [low, high]


def _text(value: float) -> str:
    return wording.number(float(f"{value:.6g}"))
