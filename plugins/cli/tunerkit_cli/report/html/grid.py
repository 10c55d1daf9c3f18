"""A grid of coloured cells with a text in each: what heatmaps and matrices have in common."""

from collections.abc import Iterator, Sequence
from typing import Final
from unicodedata import east_asian_width

import attrs
from markupsafe import Markup

from tunerkit_cli.report import wording
from tunerkit_cli.report.html.elements import Element, element, svg, titled

# Widths of letters at the labels' size in pixels, for a wide font.
_CAPITAL, _LETTER, _NARROW, _IDEOGRAPH = 9.0, 7.6, 4.7, 12.5
_LONGEST_LABEL: Final = 26
_GAP: Final = 2  # between cells


@attrs.frozen
class Cell:
    """A cell: its text, a second line below it, what hovering shows, and how dark it is, from 0 to 1.

    ``kind`` names its colour. ``is_marked`` puts a mark into its corner.
    """

    text: str
    title: str
    shade: float
    kind: str = "amount"
    detail: str = ""
    is_marked: bool = False


@attrs.frozen
class Grid:
    """A drawing of cells, which may be wider than its box, and one of the rows' labels, which stays in view."""

    labels: Markup
    cells: Markup
    x_title: str
    y_title: str
    width: int


def grid(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Sequence[Cell | None]],
    *,
    size: tuple[int, int],
    titles: tuple[str, str],
    label: str,
) -> Grid:
    """Draw ``cells[row][column]``, each of ``size`` pixels; None leaves a cell out. ``titles``: of columns, of rows."""
    width, height = size
    widest = max(map(_text_width, columns), default=0)
    is_upright = widest > width - _GAP
    top = widest + 10 if is_upright else 22
    drawn = [
        _cell(cell, column * width, top + row * height, size)
        for row, line in enumerate(cells)
        for column, cell in enumerate(line)
        if cell is not None
    ]
    heads = [_head(name, column * width + width / 2, top, is_upright) for column, name in enumerate(columns)]
    full, total = len(columns) * width, top + len(rows) * height
    left = max(map(_text_width, rows), default=0) + 10
    return Grid(
        labels=svg(_row_labels(rows, left, top, height), label=None, width=left, height=total),
        cells=svg([*heads, *drawn], label=label, width=full, height=total),
        x_title=titles[0],
        y_title=titles[1],
        width=left + full,
    )


def _cell(cell: Cell, x: float, y: float, size: tuple[int, int]) -> Element:
    width, height = size[0] - _GAP, size[1] - _GAP
    middle, centre = x + width / 2, y + height / 2
    strength = " strong" if cell.shade > 0.55 else ""
    parts = [element("rect", x=x, y=y, width=width, height=height, rx=3)]
    if cell.is_marked:
        parts.append(element("path", d=f"M{x + width - 9:g} {y}h6a3 3 0 0 1 3 3v6z", class_="cap"))
    offset = 4 if not cell.detail else -2
    parts.append(element("text", cell.text, x=middle, y=centre + offset))
    if cell.detail:
        parts.append(element("text", cell.detail, x=middle, y=centre + 13, class_="detail"))
    made = titled("g", cell.title, class_=f"cell {cell.kind}{strength}", style=f"--v:{cell.shade:.2f}")
    made.extend(parts)
    return made


def _head(name: str, x: float, bottom: int, is_upright: bool) -> Element:
    text = wording.short_text(name, _LONGEST_LABEL)
    if is_upright:
        x, y = x + 4, bottom - 6
        return _labelled(name, text, x=x, y=y, transform=f"rotate(-90 {x:g} {y})", class_="upright")
    return _labelled(name, text, x=x, y=bottom - 8, class_="head")


def _row_labels(rows: Sequence[str], right: float, top: int, height: int) -> Iterator[Element]:
    for number, name in enumerate(rows):
        y = top + number * height + (height - _GAP) / 2 + 4
        text = wording.short_text(name, _LONGEST_LABEL)
        yield _labelled(name, text, x=right - 8, y=y, class_="row")


def _labelled(name: str, text: str, **attributes: object) -> Element:
    made = titled("text", name, **attributes)
    made[0].tail = text  # after the title, as the text of the label itself
    return made


def _text_width(name: str) -> int:
    """Return about how many pixels a label takes."""
    shown = wording.short_text(name, _LONGEST_LABEL)
    return round(sum(map(_letter_width, shown)))


def _letter_width(letter: str) -> float:
    if east_asian_width(letter) in "WF":
        return _IDEOGRAPH
    if letter in "iljtf.,:;'|!()[]- ":
        return _NARROW
    return _CAPITAL if letter.isupper() or letter in "mw_%" else _LETTER
