"""The panels of a report as matplotlib figures (extra ``[plot]``), built without pyplot: there is nothing to close."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tunerkit_cli.report import curves, scores, wording
from tunerkit_cli.report.curves import Curve, Panel
from tunerkit_cli.report.rank_map import RankMap, by_layer, by_matrix, rank_map
from tunerkit_cli.report.record import Run, read

_MOST_LABELS: Final = 30
_LONGEST_LABEL: Final = 30


def draw(record: Mapping[str, Any]) -> Mapping[str, Figure]:
    """Return a figure for each panel that says something, by a name for its file, such as ``ranks``.

    Args:
        record: The record of the run, as ``run.json`` has it.

    Raises:
        RecordError: The record is damaged, or of another version.
    """
    run = read(record)
    return dict((*_curves(run), *_ranks(run), *_amounts(run)))


def _curves(run: Run) -> Iterator[tuple[str, Figure]]:
    for panel in (*curves.panels(run), curves.spectrum(run)):
        if panel is not None:
            yield panel.name, draw_panel(panel)


def _ranks(run: Run) -> Iterator[tuple[str, Figure]]:
    if len(set(run.ranks.values())) > 1:
        highest = max((rank for change in run.history for rank in change.ranks), default=None)
        title = f"{wording.method_title(run.method)}: live ranks"
        title += f" after {run.steps:,} steps" if run.steps is not None else ""
        yield "ranks", draw_ranks(rank_map(run.ranks), title=title, initial=highest)


def _amounts(run: Run) -> Iterator[tuple[str, Figure]]:
    groups = {"by matrix": by_matrix(run.sizes), "by layer": by_layer(run.sizes)}
    if shown := {name: amounts for name, amounts in groups.items() if amounts}:
        yield "parameters", draw_amounts(shown, title="Where the parameters went")
    if 1 < len(run.confusion) <= _MOST_LABELS:
        yield "confusion", draw_confusion(run.confusion, scores.label_names(run))
    elif errors := scores.errors_by_label(run):
        rates = {name: found.errors / found.rows for name, found in errors.items() if found.rows}
        worst = sorted(rates, key=lambda name: -rates[name])[:_MOST_LABELS]
        shares = {"share of wrong rows": {name: rates[name] for name in worst}}
        yield "errors", draw_amounts(shares, title="Errors by label")


def draw_ranks(map_: RankMap, *, title: str, initial: int | None = None) -> Figure:
    """Draw a heatmap, layer by matrix, with the rank in each cell. ``initial`` is the upper end of the colour scale."""
    highest = initial or max((cell or 0 for row in map_.cells for cell in row), default=1) or 1
    figure = Figure(
        (2.5 + 0.75 * max(len(map_.matrices), 4), 2.0 + 0.42 * max(len(map_.layers), 3)), layout="constrained"
    )
    axes = figure.subplots()
    cells = [[float("nan") if cell is None else float(cell) for cell in row] for row in map_.cells]
    image = axes.imshow(cells, aspect="auto", cmap="viridis", vmin=0, vmax=highest)
    _label(axes, map_.layers, map_.matrices, titles=(title, "matrix", "layer"))
    for y, row in enumerate(map_.cells):
        for x, cell in enumerate(row):
            if cell is not None:  # viridis is light at its upper end
                _write(axes, x, y, str(cell), "black" if cell > 0.6 * highest else "white")
    figure.colorbar(image, ax=axes, label="live rank", ticks=MaxNLocator(nbins=8, integer=True))
    return figure


def draw_confusion(confusion: Sequence[Sequence[int]], labels: Sequence[str]) -> Figure:
    """Draw a heatmap of true labels by predicted ones, with counts; the colour is the share of the row."""
    shares = [[count / (sum(row) or 1) for count in row] for row in confusion]
    side = 2.5 + 0.7 * len(labels)
    figure = Figure((side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [wording.short_text(label, _LONGEST_LABEL) for label in labels]
    _label(axes, names, names, titles=("Confusion matrix", "predicted", "true"))
    for y, row in enumerate(confusion):
        for x, count in enumerate(row):
            _write(axes, x, y, f"{count:,}", "white" if shares[y][x] > 0.55 else "black")
    figure.colorbar(image, ax=axes, label="share of the row")
    return figure


def draw_panel(panel: Panel) -> Figure:
    """Draw the curves of a panel on common axes."""
    figure = Figure((8, 4.5), layout="constrained")
    axes = figure.subplots()
    colour = 0
    for curve in panel.curves:
        _draw(axes, curve, f"C{colour % 10}")
        colour += curve.style not in ("faint", "mark")  # a faint curve has the colour of the one that summarises it
    axes.set(title=panel.title, xlabel=panel.x_title, ylabel=panel.unit, yscale="log" if panel.is_log else "linear")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel.unit:  # amounts; a line at 0 would coincide with the frame
        axes.set_ylim(bottom=-0.04 * axes.get_ylim()[1])
    axes.grid(alpha=0.3)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=False)
    return figure


def draw_amounts(groups: Mapping[str, Mapping[str, float]], *, title: str) -> Figure:
    """Draw horizontal bars, a panel per group, in the groups' own orders from top to bottom."""
    figure = Figure((5 * len(groups), 1.6 + 0.24 * max(map(len, groups.values()))), layout="constrained")
    for axes, (name, amounts) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        names = [wording.short_text(each, _LONGEST_LABEL) for each in amounts]
        axes.barh(range(len(names)), list(amounts.values()))
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_title(name)
        axes.grid(alpha=0.3, axis="x")
    figure.suptitle(title)
    return figure


def _draw(axes: Axes, curve: Curve, colour: str) -> None:
    """Draw a curve in its style; a faint one is not in the legend."""
    styles: dict[str, dict[str, Any]] = {
        "line": {"linewidth": 2},
        "steps": {"drawstyle": "steps-post"},
        "faint": {"alpha": 0.3, "linewidth": 0.8, "label": None},
        "dots": {"marker": "o"},
        "mark": {"color": "grey", "linestyle": "--"},
    }
    x, y = [point[0] for point in curve.points], [point[1] for point in curve.points]
    axes.plot(x, y, **{"color": colour, "label": curve.name, **styles[curve.style]})


def _label(axes: Axes, rows: Sequence[str], columns: Sequence[str], *, titles: tuple[str, str, str]) -> None:
    """Name the rows and columns of a heatmap. ``titles``: its own, that of the columns, and that of the rows."""
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    axes.set(title=titles[0], xlabel=titles[1], ylabel=titles[2])


def _write(axes: Axes, x: int, y: int, text: str, colour: str) -> None:
    axes.text(x, y, text, ha="center", va="center", color=colour, fontsize=9)
