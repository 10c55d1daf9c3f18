"""Plots with matplotlib: ranks and budget, curves, amounts, and a confusion matrix."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tunerkit.records import RankChange
from tunerkit_cli.report import curves, wording
from tunerkit_cli.report.curves import Curve, Panel
from tunerkit_cli.report.rank_map import RankMap
from tunerkit_cli.report.record import Change

_LONGEST_LABEL = 30

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
    changes = [Change(step=each.step, ranks=tuple(each.ranks.values()), budget=each.budget) for each in history]
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    _draw(above, curves.budget_curve(changes), "C0")
    above.set_ylabel(f"budget in force ({unit})")
    above.set_title(title)
    summaries = curves.rank_curves(changes)
    for curve, colour in zip(summaries, ("C1", "C0", "C2"), strict=True):
        _draw(below, curve, colour)
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


def draw_panel(panel: Panel) -> Figure:
    """Draw the curves of a panel on common axes."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    colour = 0
    for curve in panel.curves:
        _draw(axes, curve, f"C{colour % 10}")
        colour += curve.style not in ("faint", "mark")  # a faint curve has the colour of the one that summarises it
    axes.set_title(panel.title)
    axes.set_xlabel(panel.x_title)
    axes.set_ylabel(panel.unit)
    axes.set_yscale("log" if panel.is_log else "linear")
    axes.grid(alpha=0.3)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=False)
    return figure


def draw_amounts(groups: Mapping[str, Mapping[str, float]], *, title: str) -> Figure:
    """Draw horizontal bars, a panel per group, in the groups' own orders from top to bottom."""
    figure = Figure(figsize=(5 * len(groups), 1.6 + 0.24 * max(map(len, groups.values()))), layout="constrained")
    for axes, (name, amounts) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        names = [wording.short_text(each, _LONGEST_LABEL) for each in amounts]
        axes.barh(range(len(names)), list(amounts.values()))
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_title(name)
        axes.grid(alpha=0.3, axis="x")
    figure.suptitle(title)
    return figure


def draw_confusion(confusion: Sequence[Sequence[int]], labels: Sequence[str]) -> Figure:
    """Draw a heatmap of true labels by predicted ones, with counts; the colour is the share of the row."""
    shares = [[count / (sum(row) or 1) for count in row] for row in confusion]
    names = [wording.short_text(label, _LONGEST_LABEL) for label in labels]
    side = 2.5 + 0.7 * len(labels)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title("Confusion matrix")
    for y, row in enumerate(confusion):
        for x, count in enumerate(row):
            colour = "white" if shares[y][x] > 0.55 else "black"
            axes.text(x, y, f"{count:,}", ha="center", va="center", color=colour, fontsize=9)
    figure.colorbar(image, ax=axes, label="share of the row")
    return figure


def _draw(axes: Axes, curve: Curve, colour: str) -> None:
    """Draw a curve in its style; a faint one is not in the legend."""
    x, y = [point[0] for point in curve.points], [point[1] for point in curve.points]
    match curve.style:
        case "steps":
            axes.step(x, y, where="post", color=colour, label=curve.name)
        case "faint":
            axes.plot(x, y, color=colour, alpha=0.3, linewidth=0.8)
        case "dots":
            axes.plot(x, y, color=colour, marker="o", label=curve.name)
        case "mark":
            axes.plot(x, y, color="grey", linestyle="--", label=curve.name)
        case "line":
            axes.plot(x, y, color=colour, linewidth=2, label=curve.name)


def _heatmap_size(map_: RankMap) -> tuple[float, float]:
    return 2.5 + 0.75 * max(len(map_.matrices), 4), 2.0 + 0.42 * max(len(map_.layers), 3)


def _write_numbers(axes: Axes, map_: RankMap, highest: int) -> None:
    for y, row in enumerate(map_.cells):
        for x, cell in enumerate(row):
            if cell is not None:
                # viridis is light at its upper end, so use black text there
                colour = "black" if cell > 0.6 * highest else "white"
                axes.text(x, y, str(cell), ha="center", va="center", color=colour, fontsize=9)
