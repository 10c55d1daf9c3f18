"""The rank map as a table for the terminal."""

from rich.table import Table

from tunerkit_cli.report.rank_map import RankMap

_SHADES = ("grey50", "steel_blue", "cyan", "green", "bold yellow")


def rank_table(map_: RankMap, *, initial: int | None = None) -> Table:
    """Build a table with a row per layer, a column per matrix, and sums. A rank of ``initial`` has the full colour."""
    full = initial or max((cell or 0 for row in map_.cells for cell in row), default=1) or 1
    table = Table(title=f"live ranks, {map_.total} in total", title_justify="left", show_footer=True)
    table.add_column("layer", footer="sum")
    for name, column in zip(map_.matrices, zip(*map_.cells, strict=True), strict=True):
        # Break long names at their dots, so that the columns stay narrow.
        table.add_column(name.replace(".", ".\n"), footer=str(_sum(column)), justify="right")
    table.add_column("sum", footer=str(map_.total), justify="right")
    for layer, row in zip(map_.layers, map_.cells, strict=True):
        table.add_row(layer, *(_cell(cell, full) for cell in row), str(_sum(row)))
    return table


def _sum(cells: tuple[int | None, ...]) -> int:
    return sum(cell for cell in cells if cell is not None)


def _cell(rank: int | None, full: int) -> str:
    if rank is None:
        return ""
    shade = _SHADES[min(rank * (len(_SHADES) - 1) // full, len(_SHADES) - 1)]
    return f"[{shade}]{rank}[/]"
