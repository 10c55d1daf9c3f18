"""Tables from rows."""

from collections.abc import Sequence

from benchmarks.quality.grids import BETWEEN, ENDS
from benchmarks.quality.scores import Cell, best, interval, paired
from benchmarks.quality.store import Row

HEADROOM = 1.0  # points between the ranks 1 and 8, below which a curve counts as flat
_RANKS = sorted((*ENDS, *BETWEEN))


def headroom_table(rows: Sequence[Row]) -> list[str]:
    """LoRA's validation accuracy by rank, and whether rank 8 is a point above rank 1; one seed leaves that open."""
    lines = [
        f"| task | {' | '.join(f'r = {rank}' for rank in _RANKS)} | r = 8 − r = 1 | headroom |",
        f"|---|{'---:|' * (len(_RANKS) + 1)}---|",
    ]
    for task in dict.fromkeys(row["task"] for row in rows):
        cells = {
            rank: best(own)
            for rank in _RANKS
            if (own := [row for row in rows if (row["task"], row["rank"]) == (task, rank)])
        }
        shown = [_shown(cells[rank]) if rank in cells else "" for rank in _RANKS]
        if {1, 8} <= cells.keys():
            difference = paired(cells[8], cells[1])
            gain, low, high = interval([difference])
            if len(difference) > 1:
                shown += [f"{gain:+.2f} [{low:+.2f}, {high:+.2f}]", "yes" if gain >= HEADROOM else "no"]
            else:
                shown += [f"{gain:+.2f}", "open"]
        else:
            shown += ["", ""]
        lines.append(f"| {task} | {' | '.join(shown)} |")
    return lines


def _shown(cell: Cell) -> str:
    error = f" ± {cell.error:.2f}" if len(cell.seeds) > 1 else ""
    return f"{cell.mean:.2f}{error} ({cell.rate:g}, {len(cell.seeds)})"
