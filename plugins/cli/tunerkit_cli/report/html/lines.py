"""Line charts: curves over steps, drawn as SVG that stretches to the width of its box.

The drawing has no text, as that would be stretched too: ticks and legend are HTML beside it.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final

import attrs
from markupsafe import Markup

from tunerkit_cli.report import wording
from tunerkit_cli.report.curves import Curve, Panel, Points
from tunerkit_cli.report.html.axes import Axis, Tick, fitted
from tunerkit_cli.report.html.elements import Element, element, svg, titled

SIZE: Final = 1000  # the drawing's own units in both directions
_MOST_STRIPS: Final = 80  # stretches of the x-axis with a hover text of their own
_CROWDED: Final = 12
COLOURS: Final = 8


@attrs.frozen
class Key:
    """An entry of a legend: its text, and the classes of its sample."""

    text: str
    style: str


@attrs.frozen
class Chart:
    """A drawing with what stands around it. ``is_crowded`` says that it has too many curves to see each clearly."""

    title: str
    x_title: str
    drawing: Markup
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    unit: str = ""
    legend: tuple[Key, ...] = ()
    is_crowded: bool = False

    @property
    def y_width(self) -> int:
        """The room for the y-axis's texts, in characters."""
        return max((len(tick.text) for tick in self.y_ticks), default=0)


def chart(panel: Panel, *, x_values: Sequence[float] = ()) -> Chart:
    """Draw a panel. Its x-axis also shows ``x_values``, so that charts side by side can have the same one."""
    points = [point for curve in panel.curves for point in curve.points]
    x_axis = fitted([*x_values, *(x for x, _ in points)], room=0.02)
    y_axis = fitted((y for _, y in points), is_log=panel.is_log, from_zero=panel.unit != "" and not panel.is_log)
    x_ticks, y_ticks = x_axis.ticks(), y_axis.ticks()
    styles = _styles(panel.curves)
    drawn = [_path(curve, style, x_axis, y_axis) for curve, style in zip(panel.curves, styles, strict=True)]
    drawing = svg(
        [grid_lines(x_ticks, y_ticks), *drawn, *_strips(panel, x_axis)],
        label=_described(panel),
        viewBox=f"0 0 {SIZE} {SIZE}",
        preserveAspectRatio="none",
    )
    return Chart(
        title=panel.title,
        unit=panel.unit,
        x_title=panel.x_title,
        drawing=drawing,
        legend=_legend(panel, styles),
        x_ticks=x_ticks,
        y_ticks=y_ticks,
        is_crowded=len(panel.curves) > _CROWDED,
    )


def _styles(curves: Sequence[Curve]) -> list[str]:
    """Return the classes of each curve. A faint curve shares its colour with the next one, which summarises it."""
    styles, colour = [], 0
    for curve in curves:
        if curve.style == "mark":
            styles.append("mark")
            continue
        styles.append(f"{curve.style} c{colour % COLOURS}{' dashed' if colour >= COLOURS else ''}")
        colour += curve.style != "faint"
    return styles


def _legend(panel: Panel, styles: Sequence[str]) -> tuple[Key, ...]:
    """Name each curve; many faint ones are named together, and a single curve is named by the panel's title."""
    faint = [curve for curve in panel.curves if curve.style == "faint"]
    keys = {
        "each of them" if curve.style == "faint" and len(faint) > 2 else curve.name: style
        for curve, style in zip(panel.curves, styles, strict=True)
    }
    return tuple(Key(text, style) for text, style in keys.items()) if len(keys) > 1 else ()


def grid_lines(x_ticks: Sequence[Tick], y_ticks: Sequence[Tick]) -> Element:
    """Draw a line at each tick."""
    lines = [f"M{_units(t.place)} 0V{SIZE}" for t in x_ticks] + [f"M0 {_units(100 - t.place)}H{SIZE}" for t in y_ticks]
    return element("path", d="".join(lines), class_="grid-line")


def _path(curve: Curve, style: str, x_axis: Axis, y_axis: Axis) -> Element:
    places = [(_units(x_axis.place(x)), _units(100 - y_axis.place(y))) for x, y in curve.points]
    if curve.style == "dots":
        # A line of no length with round ends is a dot that the stretching leaves round.
        dots = "".join(f"M{x} {y}h0" for x, y in places)
        line = "M" + "L".join(f"{x} {y}" for x, y in places)
        return element("g", element("path", d=line, class_="thread"), element("path", d=dots), class_=style)
    if curve.style == "steps":
        d = f"M{places[0][0]} {places[0][1]}" + "".join(f"H{x}V{y}" for x, y in places[1:])
    else:
        d = "M" + "L".join(f"{x} {y}" for x, y in places)
    return element("path", d=d, class_=style)


def _strips(panel: Panel, x_axis: Axis) -> Iterator[Element]:
    """Yield invisible strips over the whole height, with the values of all curves there as their titles."""
    steps = sorted({x for curve in panel.curves if curve.style != "mark" for x, _ in curve.points})
    count = min(len(steps), _MOST_STRIPS)
    steps = [steps[number * len(steps) // count] for number in range(count)]
    places = [x_axis.place(step) for step in steps]
    edges = [0.0, *((a + b) / 2 for a, b in pairwise(places)), 100.0]
    for step, (left, right) in zip(steps, pairwise(edges), strict=True):
        start = _units(left)
        title = "\n".join([f"{panel.x_title} {wording.number(int(step))}", *_values(panel, step)])
        yield titled("rect", title, x=start, y=0, width=_units(right) - start, height=SIZE, class_="strip")


def _values(panel: Panel, step: float) -> Iterator[str]:
    faint = [curve for curve in panel.curves if curve.style == "faint"]
    for curve in panel.curves:
        if curve.style != "faint" or len(faint) <= 2:
            x, y = _at(curve, step)
            holds = x == step or curve.style in ("steps", "mark")
            yield f"{curve.name}: {wording.number(y)}" + ("" if holds else f" (at {wording.number(int(x))})")
    if len(faint) > 2:
        there = [y for curve in faint for x, y in curve.points if x == step]
        if there:
            yield f"from {wording.number(min(there))} to {wording.number(max(there))} in {len(there)} targets"


def _at(curve: Curve, step: float) -> tuple[float, float]:
    """Return the point of a curve that counts at a step: the last one before it if values hold, else the nearest."""
    if curve.style == "steps":
        return next((point for point in reversed(curve.points) if point[0] <= step), curve.points[0])
    return min(curve.points, key=lambda point: abs(point[0] - step))


def _described(panel: Panel) -> str:
    """Say what a drawing shows, for those who cannot see it."""
    shown = [curve for curve in panel.curves if curve.style != "faint"] or panel.curves
    ends = "; ".join(f"{curve.name} {_moves(curve.points)}" for curve in shown[:COLOURS])
    return f"{panel.title} over the {panel.x_title}: {ends}"


def _moves(points: Points) -> str:
    start, end = wording.number(points[0][1]), wording.number(points[-1][1])
    return f"is {end}" if start == end else f"goes from {start} to {end}"


def _units(percent: float) -> int:
    return round(percent * SIZE / 100)
