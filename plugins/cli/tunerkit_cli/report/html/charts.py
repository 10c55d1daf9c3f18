"""Charts of curves, as SVG that stretches to its box; texts would be stretched too, so that they are HTML beside it."""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Final

import attrs

from tunerkit_cli.report import wording
from tunerkit_cli.report.curves import TINY, Curve, Panel

_SIZE: Final = 1000  # the drawing's own units in both directions
_TICKS: Final = 5
_MOST_STRIPS: Final = 80  # stretches of the x-axis with a hover text of their own
_COLOURS: Final = 8


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

    def ticks(self) -> list[tuple[float, str]]:
        """Return about `_TICKS` ticks at round values, each with its place and its label."""
        values = (_decades if self.is_log else _round_values)(self.low, self.high)
        return [(self.place(value), wording.number(float(f"{value:.6g}"))) for value in values]


def fitted(values: Iterable[float], *, is_log: bool = False, from_zero: bool = False, room: float = 0.06) -> Axis:
    """Return the axis that shows all values, with some room beyond both ends; with ``from_zero`` it begins below 0."""
    found = list(values)
    low, high = min(found), max(found)
    if is_log:
        factor = (high / low) ** room if high > low else 2.0
        return Axis(low / factor, high * factor, is_log=True)
    low = min(low, 0.0) if from_zero else low
    scale = max(abs(low), abs(high))
    scale = scale if scale > TINY else 1.0
    # Values that differ by rounding alone get the room of equal ones.
    margin = room * (high - low if high - low > 1e-9 * scale else scale)
    return Axis(low - margin, high + margin)


def _round_values(low: float, high: float) -> Sequence[float]:
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _decades(low: float, high: float) -> Sequence[float]:
    """Return powers of ten, or 1, 2 and 5 times these; fewer decades if there are many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, round((last - first) / _TICKS))
    for factors in ((1,), (1, 3), (1, 2, 5)):
        values = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
        inside = [value for value in values if low <= value <= high]
        if len(inside) >= 3:
            return inside
    return inside if len(inside) > 1 else [low, high]


def chart(panel: Panel, *, x_values: Sequence[float] = ()) -> dict[str, Any]:
    """Draw a panel, for the template. Its x-axis also shows ``x_values``, which charts side by side have in common."""
    points = [point for curve in panel.curves for point in curve.points]
    x_axis = fitted([*x_values, *(x for x, _ in points)], is_log=panel.x_is_log, room=0.02)
    y_axis = fitted((y for _, y in points), is_log=panel.is_log, from_zero=panel.unit != "" and not panel.is_log)
    x_ticks, y_ticks = x_axis.ticks(), y_axis.ticks()
    at_ticks = [f"M{_units(place)} 0V{_SIZE}" for place, _ in x_ticks]
    at_ticks += [f"M0 {_units(100 - place)}H{_SIZE}" for place, _ in y_ticks]
    styles = _styles(panel.curves)
    curves = [line for pair in zip(panel.curves, styles, strict=True) for line in _lines(*pair, x_axis, y_axis)]
    return {
        "panel": panel,
        "label": _described(panel),
        "x_ticks": x_ticks,
        "y_ticks": y_ticks,
        "lines": (("".join(at_ticks), "grid-line"), *curves),  # paths, with their classes
        "strips": _strips(panel, x_axis),
        "legend": _legend(panel, styles),  # texts, with the classes of their lines
    }


def _styles(curves: Sequence[Curve]) -> list[str]:
    """Return the classes of each curve. A faint curve shares its colour with the next one, which summarises it."""
    styles, colour = [], 0
    for curve in curves:
        if curve.style == "mark":
            styles.append("mark")
            continue
        styles.append(f"{curve.style} c{colour % _COLOURS}{' dashed' if colour >= _COLOURS else ''}")
        colour += curve.style != "faint"
    return styles


def _legend(panel: Panel, styles: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Name each curve; many faint ones are named together, and a single curve is named by the panel's title."""
    keys = {
        "each of them" if curve.style == "faint" and _are_many(panel) else curve.name: style
        for curve, style in zip(panel.curves, styles, strict=True)
    }
    return tuple(keys.items()) if len(keys) > 1 else ()


def _are_many(panel: Panel) -> bool:
    return sum(curve.style == "faint" for curve in panel.curves) > 2


def _lines(curve: Curve, style: str, x_axis: Axis, y_axis: Axis) -> Iterator[tuple[str, str]]:
    places = [(_units(x_axis.place(x)), _units(100 - y_axis.place(y))) for x, y in curve.points]
    straight = "M" + "L".join(f"{x} {y}" for x, y in places)
    if curve.style == "steps":
        yield f"M{places[0][0]} {places[0][1]}" + "".join(f"H{x}V{y}" for x, y in places[1:]), style
    elif curve.style == "dots":
        yield straight, style.replace("dots", "thread")
        # A line of no length with round ends is a dot that the stretching leaves round.
        yield "".join(f"M{x} {y}h0" for x, y in places), style
    else:
        yield straight, style


def _strips(panel: Panel, x_axis: Axis) -> Iterator[tuple[int, int, str]]:
    """Yield invisible stretches of the x-axis: start, width, and what hovering shows, the values of all curves."""
    steps = sorted({x for curve in panel.curves if curve.style != "mark" for x, _ in curve.points})
    count = min(len(steps), _MOST_STRIPS)
    steps = [steps[number * len(steps) // count] for number in range(count)]
    edges = [0.0, *((x_axis.place(a) + x_axis.place(b)) / 2 for a, b in pairwise(steps)), 100.0]
    for step, (left, right) in zip(steps, pairwise(map(_units, edges)), strict=True):
        title = "\n".join([f"{panel.x_title} {_x(step)}", *_values(panel, step)])
        yield left, right - left, title


def _x(value: float) -> str:
    return wording.number(int(value) if value == int(value) else value)


def _values(panel: Panel, step: float) -> Iterator[str]:
    for curve in panel.curves:
        if curve.style != "faint" or not _are_many(panel):
            x, y = min(curve.points, key=lambda point: abs(point[0] - step))
            if curve.style == "steps":  # each value holds until the next one
                x, y = next((point for point in reversed(curve.points) if point[0] <= step), curve.points[0])
            holds = x == step or curve.style in ("steps", "mark")
            yield f"{curve.name}: {wording.number(y)}" + ("" if holds else f" (at {_x(x)})")
    there = [y for curve in panel.curves if curve.style == "faint" for x, y in curve.points if x == step]
    if there and _are_many(panel):
        yield f"from {wording.number(min(there))} to {wording.number(max(there))} in {len(there)} targets"


def _described(panel: Panel) -> str:
    """Say what a drawing shows, for those who cannot see it."""
    shown = [curve for curve in panel.curves if curve.style != "faint"] or panel.curves
    ends = []
    for curve in shown[:_COLOURS]:
        start, end = (wording.number(curve.points[n][1]) for n in (0, -1))
        ends.append(f"{curve.name} {f'is {end}' if start == end else f'goes from {start} to {end}'}")
    return f"{panel.title} over the {panel.x_title}: {'; '.join(ends)}"


def _units(percent: float) -> int:
    return round(percent * _SIZE / 100)
