"""Tables that draw: the heatmap of ranks, which are also summarised here, and the confusion matrix."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Final

import attrs

from tunerkit_cli.report import wording
from tunerkit_cli.report.rank_map import rank_map
from tunerkit_cli.report.record import Run

MOST_CELLS: Final = 2000
MOST_LABELS: Final = 20
LONGEST_NAME: Final = 26
_ROOM: Final = 960  # pixels for the cells, on a wide screen
_LETTER: Final = 8  # pixels that a letter takes at most, or nearly so


@attrs.frozen
class Cell:
    """A cell: its text, a second line below it, what hovering shows, how dark it is, its kind of colour, and a mark."""

    text: str
    title: str
    shade: float
    kind: str = "amount"  # names its colour
    detail: str = ""
    is_marked: bool = False


@attrs.frozen
class Grid:
    """``cells[row][column]``, of so many pixels each; None leaves a cell out. ``label`` is for those who cannot see."""

    rows: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[Sequence[Cell | None]]
    cell_width: int
    cell_height: int
    x_title: str
    y_title: str
    label: str

    @property
    def is_upright(self) -> bool:
        """Whether the names of columns are too long to lie above them."""
        return _width(self.columns) > self.cell_width

    @property
    def is_wide(self) -> bool:
        """Whether it needs more than half of a wide screen."""
        return _width(self.rows) + len(self.columns) * self.cell_width > 520


def _width(names: Sequence[str]) -> int:
    return _LETTER * min(max(map(len, names), default=0), LONGEST_NAME)


def heatmap(run: Run, highest: int | None = None) -> Grid | None:
    """Draw the first live ranks if they differ, layers side by side: they are often more than matrices, and short."""
    ranks, caps = dict(run.ranks), dict(_telling_caps(run))
    for path, own in run.experts.items():  # a cell for each expert in place of that of their stack
        ranks |= {f"{path}.{expert}": rank for expert, rank in enumerate(own)}
        caps |= dict.fromkeys((f"{path}.{expert}" for expert in range(len(own))), run.caps.get(path, 0) // len(own))
        del ranks[path]
    if len(set(ranks.values())) < 2:
        return None
    highest = highest or highest_rank(run)
    shown = dict(list(ranks.items())[:MOST_CELLS])
    map_ = rank_map({path: (rank, caps.get(path)) for path, rank in shown.items()})
    cells = [
        [
            None if found is None else _rank_cell(f"layer {layer}, {matrix}", highest, *found)
            for layer, found in zip(map_.layers, column, strict=True)
        ]
        for matrix, column in zip(map_.matrices, zip(*map_.cells, strict=True), strict=True)
    ]
    width = min(50, max(30, _ROOM // len(map_.layers)))
    total, low, high = sum(shown.values()), min(shown.values()), max(shown.values())
    label = f"Live rank by matrix and layer, {total:,} in total: from {low} to {high}"
    return Grid(map_.matrices, map_.layers, cells, width, 40 if width > 36 else 28, "layer", "matrix", label)


def _rank_cell(place: str, highest: int, rank: int, cap: int | None) -> Cell:
    is_capped = cap is not None and 0 < cap <= rank
    limit = "" if cap is None else f" of at most {cap}"
    title = f"{place}: rank {rank}{limit}{', at its cap' if is_capped else ''}"
    return Cell(str(rank), title, min(rank / highest, 1.0), is_marked=is_capped)


def confusion_matrix(confusion: Sequence[Sequence[int]], labels: Sequence[str]) -> Grid:
    """Draw true labels as rows and predicted ones as columns. Right predictions have another colour than wrong ones."""
    cells = [
        [_share_cell(rows, sum(line), labels[n], labels[k], n == k) for k, rows in enumerate(line)]
        for n, line in enumerate(confusion)
    ]
    right, total = sum(line[n] for n, line in enumerate(confusion)), sum(map(sum, confusion))
    label = f"Confusion matrix: {right:,} of {total:,} rows predicted as they are labelled"
    return Grid(labels, labels, cells, min(76, max(50, _ROOM // len(labels))), 46, "predicted", "true", label)


def _share_cell(rows: int, of: int, true: str, predicted: str, is_right: bool) -> Cell:
    share = rows / of if of else 0.0
    title = f"{true} predicted as {predicted}: {rows:,} of {of:,} rows, {wording.percent(share)}"
    text = f"{100 * share:.1f}{wording.SPACE}%" if of else "–"
    return Cell(text, title, share, kind="right" if is_right else "wrong", detail=f"{rows:,}")


# --- ranks in words and numbers ---


def rank_summary(run: Run) -> str:
    """Say in a sentence how the ranks are distributed; empty without ranks."""
    if not run.ranks:
        return ""
    ranks = list(run.ranks.values())
    gone, full = ranks.count(0), capped(run)
    low, high = min(ranks), max(ranks)
    spread = f"{low} each" if low == high else f"{fmean(ranks):.1f} on average, from {low} to {high}"
    said = [f"{sum(ranks):,} live ranks in {len(ranks):,} matrices: {spread}"]
    said += [f"{full} at their cap"] if full else []
    said += [f"{gone} without any"] if gone else []
    said += [f"the first {MOST_CELLS:,} matrices are shown"] if len(ranks) > MOST_CELLS else []
    return f"{'; '.join(said)}."


def highest_rank(run: Run) -> int:
    """Return the rank with the full colour: the greatest that a target has, had or may have."""
    if run.experts:  # the cap of an expert, not that of a stack
        return max(run.caps.get(path, 0) // len(run.experts.get(path, (0,))) for path in run.ranks) or 1
    had = (max(change.ranks, default=0) for change in run.history)
    return max((*run.ranks.values(), *(run.caps.get(path, 0) for path in run.ranks), *had), default=1) or 1


def capped(run: Run) -> int:
    """Return how many targets have the greatest rank that they may have."""
    return sum(0 < cap <= run.ranks[path] for path, cap in _telling_caps(run).items())


def _telling_caps(run: Run) -> Mapping[str, int]:
    """Return the caps of the targets; none if all have their greatest rank, as without a budget."""
    caps = {path: cap for path, cap in run.caps.items() if path in run.ranks}
    return {} if caps == run.ranks else caps
