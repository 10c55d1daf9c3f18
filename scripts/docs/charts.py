"""The charts of speed and of quality, drawn from the tables in docs/evidence: `python -m scripts.docs.charts`."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import attrs

ROOT = Path(__file__).parents[2]
EVIDENCE = ROOT / "docs/evidence"
IMAGES = ROOT / "docs/images"
LORA: Final = "#2563eb"
ADALORA: Final = "#ea580c"
_LABELS = 190  # pixels for the names of the rows
_PANEL, _GAP, _ROW, _TOP = 250, 40, 26, 84
_VALUE = re.compile(r"([+-]?\d[\d.]*)(?: \[([+-]?\d[\d.]*), ([+-]?\d[\d.]*)\])?")


@attrs.frozen
class Mark:
    """A dot at a value, and the interval around it, if there is one."""

    value: float
    interval: tuple[float, float] | None
    colour: str
    filled: bool = True


@attrs.frozen
class Panel:
    """A part of a chart: its title, and the marks of each row."""

    title: str
    rows: list[list[Mark]]


def table(page: Path, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without the row of dashes."""
    _, _, below = page.read_text(encoding="utf-8").partition(f"# {heading}\n")
    found = re.search(r"(?:^\|.*\n)+", below, re.MULTILINE)
    if found is None:
        raise ValueError(f"{page.name} has no table under {heading!r}")
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in found[0].splitlines())
    return [head, *rows]


def mark(cell: str, colour: str, *, filled: bool = True) -> Mark:
    """The mark of a cell such as ``+0.16 [-0.19, +0.53]``, or ``0.911``."""
    found = _VALUE.fullmatch(cell.strip("*"))
    if found is None:
        raise ValueError(f"{cell!r} is no number")
    value, low, high = found.groups()
    return Mark(float(value), (float(low), float(high)) if low else None, colour, filled)


def drawn(
    title: str,
    names: Sequence[str],
    panels: Sequence[Panel],
    *,
    ticks: Sequence[float],
    level: float,
    key: Sequence[tuple[str, Mark]],
) -> str:
    """A chart as SVG: a row for each name, panels side by side over one scale, with a dark line at ``level``."""
    width = _LABELS + len(panels) * (_PANEL + _GAP)
    bottom = _TOP + _ROW * len(names)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 36}" font-family="sans-serif" '
        'font-size="13" fill="#1e293b" role="img">',
        f"<title>{title}</title>",
        f'<rect width="{width}" height="{bottom + 36}" rx="8" fill="#ffffff"/>',
        *_key(key),
        *(
            f'<text x="{_LABELS - 16}" y="{_TOP + _ROW * row + 18}" text-anchor="end">{name}</text>'
            for row, name in enumerate(names)
        ),
    ]
    for number, panel in enumerate(panels):
        lines += _panel(panel, _LABELS + number * (_PANEL + _GAP), bottom, ticks, level)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _key(key: Sequence[tuple[str, Mark]]) -> Iterator[str]:
    x = 24
    for text, each in key:
        yield _dot(x, 24, each)
        yield f'<text x="{x + 10}" y="28">{text}</text>'
        x += 30 + 7 * len(text)


def _panel(panel: Panel, left: int, bottom: int, ticks: Sequence[float], level: float) -> Iterator[str]:
    low, high = ticks[0], ticks[-1]

    def at(value: float) -> float:
        return round(left + _PANEL * (value - low) / (high - low), 1)

    yield f'<text x="{left + _PANEL / 2:g}" y="62" text-anchor="middle" font-weight="bold">{panel.title}</text>'
    for tick in ticks:
        colour, wide = ("#334155", 2) if tick == level else ("#e2e8f0", 1)
        yield f'<path d="M{at(tick):g} {_TOP - 8}V{bottom}" stroke="{colour}" stroke-width="{wide}"/>'
        yield f'<text x="{at(tick):g}" y="{bottom + 20}" text-anchor="middle" font-size="12">{tick:g}</text>'
    for row, marks in enumerate(panel.rows):
        for number, each in enumerate(marks):
            y = round(_TOP + _ROW * (row + (number + 1) / (len(marks) + 1)), 1)
            if each.interval:
                yield f'<path d="M{at(each.interval[0]):g} {y:g}H{at(each.interval[1]):g}" stroke="{each.colour}"/>'
            yield _dot(at(each.value), y, each)


def _dot(x: float, y: float, each: Mark) -> str:
    fill = each.colour if each.filled else "#ffffff"
    return f'<circle cx="{x:g}" cy="{y:g}" r="4" fill="{fill}" stroke="{each.colour}" stroke-width="1.5"/>'


def speed() -> str:
    """Whole steps as a share of PEFT LoRA's, on two hosts: a dot for each method, shape and number of threads."""
    page = EVIDENCE / "speed-tables.md"
    _, *second = table(page, "Another host, and the present code")
    by_name = {name: cells for name, *cells in second}
    names: list[str] = []
    panels = []
    for number, title in enumerate(("one thread", "two threads")):
        _, *rows = table(page, f"The processor as it is, {title}")
        names = [name for name, *_ in rows]
        panel = Panel(title, [])
        for name, lora, adalora, *_ in rows:
            now = [cell.split(", ")[1] for cell in by_name[name][2 * number : 2 * number + 2]]
            panel.rows.append(
                [
                    mark(lora, LORA),
                    mark(adalora, ADALORA),
                    mark(now[0], LORA, filled=False),
                    mark(now[1], ADALORA, filled=False),
                ]
            )
        panels.append(panel)
    key = [
        ("LoRA", Mark(0, None, LORA)),
        ("AdaLoRA", Mark(0, None, ADALORA)),
        ("LoRA, another host, now", Mark(0, None, LORA, filled=False)),
        ("AdaLoRA, another host, now", Mark(0, None, ADALORA, filled=False)),
    ]
    return drawn(
        "The time of a step; PEFT LoRA's is 1", names, panels, ticks=(0.7, 0.8, 0.9, 1.0, 1.1), level=1.0, key=key
    )


def quality() -> str:
    """Test accuracy of AdaLoRA minus LoRA's, by size and by the rate at which they are compared."""
    head, *sizes = table(EVIDENCE / "quality.md", "Quality")
    panels = [Panel(row[0], [[mark(cell, ADALORA)] for cell in row[2:]]) for row in sizes]
    key = [("AdaLoRA minus LoRA, points of test accuracy", Mark(0, None, ADALORA))]
    return drawn(
        "Test accuracy of AdaLoRA minus LoRA's", head[2:], panels, ticks=(-1, -0.5, 0, 0.5, 1), level=0, key=key
    )


CHARTS = {IMAGES / "speed.svg": speed, IMAGES / "quality.svg": quality}

if __name__ == "__main__":
    for path, draw in CHARTS.items():
        path.write_text(draw(), encoding="utf-8")
        print(f"{path.relative_to(ROOT)} is drawn")
