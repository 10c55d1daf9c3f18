"""Write the results into docs/concepts/reliability.md: a table of all rows, with versions and date."""

import platform
import re
from collections.abc import Iterable, Mapping
from datetime import date
from importlib import metadata
from pathlib import Path

from tests.faults.harness import Result
from tests.faults.table import ROWS

PAGE = Path(__file__).parents[2] / "docs" / "concepts" / "reliability.md"
_MARKS = ("<!-- results: written by python -m tests.faults --write -->", "<!-- end of the results -->")
_HEAD = ("| row | what is done | tunerkit | peft | what counts as a failure |", "|---|---|---|---|---|")
_LIBRARIES = ("tunerkit", "tunerkit-lora", "tunerkit-adalora", "peft", "transformers", "torch", "safetensors")


def write(results: Iterable[Result], page: Path = PAGE) -> None:
    """Put results into the page's table. Rows that were not run keep what they have."""
    text = page.read_text(encoding="utf-8")
    start, end = (text.index(mark) for mark in _MARKS)
    cells = read(text[start:end]) | {(found.row, found.subject): _cell(found) for found in results}
    table = "\n".join([*_HEAD, *_lines(cells)])
    found = f"{_MARKS[0]}\n\n{_sums(cells)}\n\n{_versions()}\n\n{table}\n\n"
    page.write_text(text[:start] + found + text[end:], encoding="utf-8")


def read(text: str) -> dict[tuple[str, str], str]:
    """Return the results of a page, by row and subject."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    found = {cells[0]: cells for cells in lines if cells[0] in {row.name for row in ROWS}}
    return {(name, "tunerkit"): cells[2] for name, cells in found.items()} | {
        (name, "peft"): cells[3] for name, cells in found.items()
    }


def _cell(found: Result) -> str:
    return f"{len(found.failures):,} of {found.cases:,}"


def _lines(cells: Mapping[tuple[str, str], str]) -> list[str]:
    return [
        f"| {row.name} | {row.done} | {cells.get((row.name, 'tunerkit'), 'not run')} | "
        f"{row.peft or cells.get((row.name, 'peft'), 'not run')} | {row.failure} |"
        for row in ROWS
    ]


def _sums(cells: Mapping[tuple[str, str], str]) -> str:
    """Return the first sentence of the results: what was found in all rows together."""
    sums = {name: [0, 0] for name in ("tunerkit", "peft")}
    for (_, name), cell in cells.items():
        numbers = re.fullmatch(r"([\d,]+) of ([\d,]+)", cell)
        for place, number in enumerate(numbers.groups() if numbers else ()):
            sums[name][place] += int(number.replace(",", ""))
    ours, theirs = sums["tunerkit"], sums["peft"]
    return (
        f"**tunerkit: {ours[0]:,} failures in {ours[1]:,} injected faults. "
        f"peft's LoRA, where it has the same operation: {theirs[0]:,} in {theirs[1]:,}.**"
    )


def _versions() -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in _LIBRARIES)
    day = date.today()
    return f"Measured on {day.day} {day:%B %Y} with {versions}, Python {platform.python_version()}, on a CPU."
