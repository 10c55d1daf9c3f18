"""The rank heatmap, matrix by layer."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from tunerkit_cli.report.html.grid import Cell, Grid, grid
from tunerkit_cli.report.rank_map import RankMap, rank_map

_NO_CAP: Final = -1
MOST_CELLS: Final = 2000  # each takes about 250 bytes of the file
_ROOM: Final = 960  # pixels for the cells, on a wide screen


def heatmap(ranks: Mapping[str, int], caps: Mapping[str, int], *, highest: int) -> Grid:
    """Draw the live ranks with a mark on those at their cap. A rank of ``highest`` has the full colour.

    Layers lie side by side: there are often more of them than matrices, and their names are short.
    """
    map_ = rank_map(ranks)
    limits = rank_map({path: caps.get(path, _NO_CAP) for path in ranks})
    cells = [
        [
            None if rank is None or cap is None else _cell(rank, cap, f"layer {layer}, {matrix}", highest)
            for layer, rank, cap in zip(map_.layers, row, row_limits, strict=True)
        ]
        for matrix, row, row_limits in zip(map_.matrices, _columns(map_), _columns(limits), strict=True)
    ]
    size = _cell_size(len(map_.layers))
    label = f"Live rank by matrix and layer, {map_.total:,} in total: "
    label += f"from {min(ranks.values())} to {max(ranks.values())}"
    return grid(map_.matrices, map_.layers, cells, size=size, titles=("layer", "matrix"), label=label)


def _columns(map_: RankMap) -> Iterable[Sequence[int | None]]:
    return zip(*map_.cells, strict=True)


def _cell(rank: int, cap: int, place: str, highest: int) -> Cell:
    is_capped = 0 < cap <= rank
    limit = f" of at most {cap}" if cap != _NO_CAP else ""
    title = f"{place}: rank {rank}{limit}{', at its cap' if is_capped else ''}"
    return Cell(str(rank), title, min(rank / highest, 1.0), is_marked=is_capped)


def _cell_size(layers: int) -> tuple[int, int]:
    width = min(50, max(30, _ROOM // layers))
    return width, 40 if width > 36 else 28
