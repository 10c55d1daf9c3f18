"""Plots of ranks and budget, with matplotlib."""

from collections.abc import Callable, Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tunerkit.records import RankChange
from tunerkit.report.rank_map import RankMap

# Figures are built without pyplot, so there is no global state and nothing to close.


def draw_ranks(map_: RankMap, *, title: str, initial: int | None = None) -> Figure:
    """Draw a heatmap, layer by matrix, with the rank in each cell. ``initial`` is the upper end of the colour scale."""
    cells = [[float("nan") if cell is None else float(cell) for cell in row] for row in map_.cells]
    highest = initial or max((cell or 0 for row in map_.cells for cell in row), default=1) or 1
    figure = Figure(figsize=_heatmap_size(map_), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(cells, aspect="auto", cmap="viridis", vmin=0, vmax=highest)
    axes.set_xticks(range(len(map_.matrices)), map_.matrices, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(map_.layers)), map_.layers)
    axes.set_xlabel("matrix")
    axes.set_ylabel("layer")
    axes.set_title(title)
    _write_numbers(axes, map_, highest)
    figure.colorbar(image, ax=axes, label="live rank", ticks=MaxNLocator(nbins=8, integer=True))
    return figure


def draw_budget(history: Sequence[RankChange], *, title: str, unit: str = "rank") -> Figure:
    """Draw two panels over optimizer steps: the budget in force, and the mean, minimum and maximum rank.

    ``history`` starts with the state before the first step. Each value holds until the next change. ``unit`` is the
    unit of the budget.
    """
    steps = [change.step for change in history]
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.step(steps, [change.budget for change in history], where="post", color="C0")
    above.set_ylabel(f"budget in force ({unit})")
    above.set_title(title)
    summaries: dict[str, Callable[[list[int]], float]] = {"greatest": max, "mean": fmean, "least": min}
    for (name, summary), colour in zip(summaries.items(), ("C1", "C0", "C2"), strict=True):
        values = [summary(list(change.ranks.values())) for change in history]
        below.step(steps, values, where="post", color=colour, label=name)
    below.set_ylabel("rank of a matrix")
    below.set_xlabel("optimizer step")
    for axes in (above, below):
        # Start below 0: a line at 0 would coincide with the frame.
        axes.set_ylim(bottom=-0.04 * axes.get_ylim()[1])
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    # Between the panels, the legend covers no curve.
    below.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(summaries), frameon=False)
    return figure


def _heatmap_size(map_: RankMap) -> tuple[float, float]:
    return 2.5 + 0.75 * max(len(map_.matrices), 4), 2.0 + 0.42 * max(len(map_.layers), 3)


def _write_numbers(axes: Axes, map_: RankMap, highest: int) -> None:
    for y, row in enumerate(map_.cells):
        for x, cell in enumerate(row):
            if cell is not None:
                # viridis is light at its upper end, so use black text there
                colour = "black" if cell > 0.6 * highest else "white"
                axes.text(x, y, str(cell), ha="center", va="center", color=colour, fontsize=9)
