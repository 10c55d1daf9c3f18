"""Results as rows of JSON and as Markdown tables."""

import json
import math
from collections.abc import Mapping, Sequence

import attrs

from benchmarks.speed.statistics import Estimate


@attrs.frozen
class Row:
    """One measured value: its part, place and contender, and the limit for the upper end of its interval."""

    part: str
    where: str
    who: str
    measure: str
    value: float
    low: float | None = None
    high: float | None = None
    limit: float | None = None

    @property
    def passed(self) -> bool | None:
        """Whether the limit is met; None if there is none. A value that is not a number misses every limit."""
        if self.limit is None:
            return None
        return (self.value if self.high is None else self.high) <= self.limit


def estimated(part: str, where: str, who: str, measure: str, found: Estimate, limit: float | None = None) -> Row:
    """A row of an estimate."""
    return Row(part, where, who, measure, found.value, found.low, found.high, limit)


def to_json(header: Mapping[str, object], rows: Sequence[Row]) -> str:
    """Header and rows; numbers that JSON cannot represent become null."""
    plain = [{**attrs.asdict(row), "passed": row.passed} for row in rows]
    tame = [{key: _tame(value) for key, value in row.items()} for row in plain]
    return json.dumps({"header": dict(header), "rows": tame}, indent=1) + "\n"


def to_markdown(header: Mapping[str, object], rows: Sequence[Row]) -> str:
    """A table of the header, one of the limits, and one for each part."""
    lines = ["# Speed and memory", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in header.items()]
    lines += ["", "## Limits", "", *limits_table(rows)]
    for part in dict.fromkeys(row.part for row in rows):
        lines += ["", f"## {part}", "", *part_table([row for row in rows if row.part == part])]
    return "\n".join(lines) + "\n"


def limits_table(rows: Sequence[Row]) -> list[str]:
    """The rows that have a limit, and whether it is met."""
    lines = ["| part | where | who | measure | found | limit | |", "|---|---|---|---|---|---|---|"]
    return lines + [
        f"| {row.part} | {row.where} | {row.who} | {row.measure} | {_found(row)} | ≤ {_number(row.limit)} "
        f"| {'met' if row.passed else 'missed'} |"
        for row in rows
        if row.limit is not None
    ]


def part_table(rows: Sequence[Row]) -> list[str]:
    """One line for each place and contender, one column for each measure."""
    measures = list(dict.fromkeys(row.measure for row in rows))
    lines = [f"| where | who | {' | '.join(measures)} |", "|---|---" + "|---:" * len(measures) + "|"]
    for where, who in dict.fromkeys((row.where, row.who) for row in rows):
        cells = {row.measure: _cell(row) for row in rows if (row.where, row.who) == (where, who)}
        lines.append(f"| {where} | {who} | {' | '.join(cells.get(measure, '') for measure in measures)} |")
    return lines


def _cell(row: Row) -> str:
    if row.limit is None:
        return _found(row)
    return f"{_found(row)} (≤ {_number(row.limit)}: {'met' if row.passed else 'missed'})"


def _found(row: Row) -> str:
    if row.low is None or row.high is None:
        return _number(row.value)
    return f"{_number(row.value)} [{_number(row.low)}, {_number(row.high)}]"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _tame(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
