"""The confusion matrix, with percentages of each row."""

from collections.abc import Sequence
from typing import Final

from tunerkit_cli.report import wording
from tunerkit_cli.report.html.grid import Cell, Grid, grid

MOST_LABELS: Final = 20
_ROOM: Final = 960  # pixels for the cells, on a wide screen


def matrix(confusion: Sequence[Sequence[int]], labels: Sequence[str]) -> Grid:
    """Draw true labels as rows and predicted ones as columns. Right predictions have another colour than wrong ones."""
    cells = [
        [_cell(rows, sum(line), labels[n], labels[k], n == k) for k, rows in enumerate(line)]
        for n, line in enumerate(confusion)
    ]
    right, total = sum(line[n] for n, line in enumerate(confusion)), sum(map(sum, confusion))
    label = f"Confusion matrix: {right:,} of {total:,} rows predicted as they are labelled"
    return grid(
        labels,
        labels,
        cells,
        size=(min(76, max(50, _ROOM // len(labels))), 46),
        titles=("predicted", "true"),
        label=label,
    )


def _cell(rows: int, of: int, true: str, predicted: str, is_right: bool) -> Cell:
    share = rows / of if of else 0.0
    title = f"{true} predicted as {predicted}: {rows:,} of {of:,} rows, {wording.percent(share)}"
    kind = "right" if is_right else "wrong"
    return Cell(f"{100 * share:.1f}{wording.SPACE}%" if of else "–", title, share, kind=kind, detail=f"{rows:,}")
