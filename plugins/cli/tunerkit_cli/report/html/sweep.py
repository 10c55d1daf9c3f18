"""The report of a sweep."""

from collections.abc import Iterable, Sequence

from tunerkit_cli.report.curves import Panel
from tunerkit_cli.report.html.page import drawn, filled
from tunerkit_cli.report.html.tables import Table
from tunerkit_cli.report.wording import capitalised


def page(title: str, sentence: str, notes: Sequence[str], table: Table, panels: Iterable[Sequence[Panel]]) -> str:
    """Return the report of a sweep as one HTML file: its sentence, its table, and a chart for each x-axis."""
    charts = [each for group in panels if group for each in drawn(group)]
    values = {"title": title, "sentence": capitalised(sentence), "notes": [*map(capitalised, notes)], "table": table}
    return filled("sweep.html.j2", {**values, "charts": charts})
