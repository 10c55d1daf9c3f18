"""Bars: amounts beside their names in a table, or upright ones in a row."""

from collections.abc import Mapping
from typing import Final

import attrs
from markupsafe import Markup

from tunerkit_cli.report import wording
from tunerkit_cli.report.html.axes import Tick, fitted
from tunerkit_cli.report.html.elements import svg, titled
from tunerkit_cli.report.html.lines import SIZE, Chart, grid_lines

MOST_BARS: Final = 128
_MOST_TICKS: Final = 12


@attrs.frozen
class Bar:
    """A row of the table: a name, a drawing, the amount and its share, as texts."""

    name: str
    drawing: Markup
    amount: str
    share: str


def bars(amounts: Mapping[str, float], shares: Mapping[str, float], *, colour: int = 0) -> tuple[Bar, ...]:
    """Draw a bar for each amount, the first `MOST_BARS` of them. Its length is its part of the greatest share."""
    longest = max(shares.values(), default=0.0) or 1.0
    return tuple(
        _bar(name, amount, shares[name], longest, colour) for name, amount in list(amounts.items())[:MOST_BARS]
    )


def _bar(name: str, amount: float, share: float, longest: float, colour: int) -> Bar:
    texts = wording.number(amount), wording.percent(share)
    title = f"{name}: {', '.join(texts)}"
    filled = titled("rect", title, width=f"{100 * share / longest:.1f}%", height=12, rx=2, class_=f"bar c{colour}")
    return Bar(name, svg([filled], label=None, width="100%", height=12), *texts)


def columns(title: str, x_title: str, amounts: Mapping[str, float]) -> Chart:
    """Draw an upright bar for each amount, side by side in their order."""
    axis = fitted(amounts.values(), from_zero=True)
    zero, width, total = axis.place(0.0), SIZE / len(amounts), sum(amounts.values()) or 1
    drawn = []
    for number, (name, amount) in enumerate(amounts.items()):
        top = SIZE / 100 * (100 - axis.place(amount))
        hover = f"{x_title} {name}: {wording.number(amount)}, {wording.percent(amount / total)}"
        place = {"x": width * (number + 0.1), "width": 0.8 * width, "y": top, "height": SIZE - SIZE / 100 * zero - top}
        drawn.append(titled("rect", hover, class_="bar c0", **place))
    every = -(-len(amounts) // _MOST_TICKS)
    names = list(amounts)[::every]
    ticks = [Tick(100 * (every * n + 0.5) / len(amounts), name.rpartition(".")[2]) for n, name in enumerate(names)]
    greatest = max(amounts, key=lambda name: amounts[name])
    ends = wording.number(min(amounts.values())), wording.number(amounts[greatest])
    label = f"{title}: from {ends[0]} to {ends[1]} in {greatest}"
    drawing = svg(
        [grid_lines((), axis.ticks()), *drawn],
        label=label,
        viewBox=f"0 0 {SIZE} {SIZE}",
        preserveAspectRatio="none",
    )
    return Chart(title=title, x_title=x_title, drawing=drawing, x_ticks=tuple(ticks), y_ticks=axis.ticks())
