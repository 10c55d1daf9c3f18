"""Plots from rows: accuracy over size and over learning rate, and the ranks that AdaLoRA chose."""

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.quality import methods
from benchmarks.quality.grids import BETWEEN, ENDS, Rows, made_for
from benchmarks.quality.runs import Run
from benchmarks.quality.scores import best, points_of
from benchmarks.quality.store import Row
from tunerkit_cli.report.rank_map import rank_map

_COLUMNS = 3
# Name, method, grid and colour; a method has the same colour in every plot. LoRA's whole curve comes from the headroom
# grid, whose runs are not all fp32.
_CURVES = (
    ("LoRA, the headroom's runs", methods.LORA, "headroom", "grey"),
    ("LoRA", methods.LORA, "rates", "C0"),
    ("AdaLoRA", methods.ADALORA, "rates", "C1"),
)
_RANKS = sorted((*ENDS, *BETWEEN))
_FRAME = 6.0  # points below the best that a panel shows: diverged runs are far below and would flatten the rest
_ABOVE = 0.5  # points above the best


def draw_sizes(tasks: Sequence[str], rows: Rows) -> Figure:
    """Validation accuracy, in points, over size (as the LoRA rank of the same cost); one panel per task."""
    figure, panels = _panels(tasks)
    for task, axes in zip(tasks, panels, strict=True):
        for name, method, grid, colour in _CURVES:
            made = {rank: made_for(Run(task, method, rank, 0.0, 0), rows, grid) for rank in _RANKS}
            cells = {rank: best(found) for rank, found in made.items() if found}
            errors = [0.0 if math.isnan(cell.error) else cell.error for cell in cells.values()]
            means = [cell.mean for cell in cells.values()]
            axes.errorbar(list(cells), means, yerr=errors, marker="o", capsize=3, color=colour, label=name)
        axes.margins(y=0.1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(_RANKS, [str(rank) for rank in _RANKS])
        axes.set_xlabel("size, as a rank of LoRA")
    return _finished(figure, panels)


def draw_rates(tasks: Sequence[str], rows: Rows, *, rank: int) -> Figure:
    """Validation accuracy, in points, over the learning rate: one dot per seed, and a line through the means.

    A line that leaves the panel leads to a mean at least `_FRAME` points below the best seed.
    """
    figure, panels = _panels(tasks)
    for task, axes in zip(tasks, panels, strict=True):
        highest, tried = 0.0, set[float]()
        for colour, (method, name) in enumerate(methods.NAMES.items()):
            dots = defaultdict[float, list[float]](list)
            for row in made_for(Run(task, method, rank, 0.0, 0), rows):
                dots[row["learning_rate"]].append(points_of(row))
            if dots:
                order = sorted(dots)
                axes.plot(order, [fmean(dots[rate]) for rate in order], color=f"C{colour}", label=name)
                for rate in order:
                    axes.scatter([rate] * len(dots[rate]), dots[rate], color=f"C{colour}", s=12)
                highest, tried = max(highest, *itertools.chain(*dots.values())), tried | dots.keys()
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(tried), [f"{rate:g}" for rate in sorted(tried)])
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, highest - _FRAME), min(high, highest + _ABOVE))
        axes.set_xlabel("learning rate")
    return _finished(figure, panels)


def draw_map(row: Row) -> Figure:
    """The rank that AdaLoRA gave each matrix in one run, as a heatmap with the rank in each cell."""
    found = rank_map(row["ranks"])
    highest = max(row["ranks"].values(), default=1) or 1
    size = 2.5 + 0.75 * max(len(found.matrices), 4), 2.0 + 0.42 * max(len(found.layers), 3)
    figure = Figure(size, layout="constrained")
    axes = figure.subplots()
    cells = [[float("nan") if cell is None else float(cell) for cell in line] for line in found.cells]
    image = axes.imshow(cells, aspect="auto", cmap="viridis", vmin=0, vmax=highest)
    axes.set_xticks(range(len(found.matrices)), found.matrices, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(found.layers)), found.layers)
    title = f"{row['task']}, rank {row['rank']}, seed {row['seed']}"
    axes.set(title=title, xlabel="matrix", ylabel="layer")
    for y, line in enumerate(found.cells):
        for x, cell in enumerate(line):
            if cell is not None:  # viridis is light at its upper end
                colour = "black" if cell > 0.6 * highest else "white"
                axes.text(x, y, str(cell), ha="center", va="center", color=colour, fontsize=9)
    figure.colorbar(image, ax=axes, label="live rank", ticks=MaxNLocator(nbins=8, integer=True))
    return figure


def _panels(tasks: Sequence[str]) -> tuple[Figure, list[Axes]]:
    lines = math.ceil(len(tasks) / _COLUMNS)
    figure = Figure(figsize=(3.2 * _COLUMNS, 2.5 * lines), layout="constrained")
    panels: list[Axes] = list(figure.subplots(lines, _COLUMNS, squeeze=False).flat)
    for spare in panels[len(tasks) :]:
        spare.set_axis_off()
    for task, axes in zip(tasks, panels, strict=False):
        axes.set_title(task)
        axes.set_ylabel("accuracy, points")
        axes.grid(alpha=0.3)
    return figure, panels[: len(tasks)]


def _finished(figure: Figure, panels: Sequence[Axes]) -> Figure:
    """Add one legend for all panels."""
    shown = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=max(1, len(shown)), frameon=False)
    return figure
