"""The panels of a report as matplotlib figures (extra ``[plot]``)."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from matplotlib.figure import Figure

from tunerkit.records import RankChange
from tunerkit_cli.report import curves, mistakes, plots, shares, wording
from tunerkit_cli.report.rank_map import rank_map
from tunerkit_cli.report.record import Run, read

_MOST_LABELS: Final = 30


def draw(record: Mapping[str, Any]) -> Mapping[str, Figure]:
    """Return a figure for each panel that says something, by a name for its file, such as ``ranks``.

    Args:
        record: The record of the run, as ``run.json`` has it.

    Raises:
        RecordError: The record is damaged, or of another version.
    """
    run = read(record)
    return dict((*_curves(run), *_ranks(run), *_amounts(run), *_mistakes(run)))


def _curves(run: Run) -> Iterator[tuple[str, Figure]]:
    for panel in curves.panels(run):
        if panel.name not in ("budget", "rank"):
            yield panel.name, plots.draw_panel(panel)
    spectrum = curves.spectrum(run)
    if spectrum is not None:
        yield spectrum.name, plots.draw_panel(spectrum)


def _ranks(run: Run) -> Iterator[tuple[str, Figure]]:
    method = wording.method_title(run.method)
    if any(change.budget is not None for change in run.history) and any(curves.rank_panels(run)):
        history = [
            RankChange(change.step, round(change.budget), dict(zip(run.ranks, change.ranks, strict=True)))
            for change in run.history
            if change.budget is not None
        ]
        unit = run.budget.unit if run.budget is not None else "rank"
        yield "budget", plots.draw_budget(history, title=f"{method}: budget and ranks", unit=unit)
    if len(set(run.ranks.values())) > 1:
        highest = max((rank for change in run.history for rank in change.ranks), default=None)
        title = f"{method}: live ranks" + (f" after {run.steps:,} steps" if run.steps is not None else "")
        yield "ranks", plots.draw_ranks(rank_map(run.ranks), title=title, initial=highest)


def _amounts(run: Run) -> Iterator[tuple[str, Figure]]:
    groups = {"by matrix": shares.by_matrix(run.sizes), "by layer": shares.by_layer(run.sizes)}
    shown = {name: amounts for name, amounts in groups.items() if amounts}
    if shown:
        yield "parameters", plots.draw_amounts(shown, title="Where the parameters went")


def _mistakes(run: Run) -> Iterator[tuple[str, Figure]]:
    if 1 < len(run.confusion) <= _MOST_LABELS:
        yield "confusion", plots.draw_confusion(run.confusion, mistakes.label_names(run))
    elif errors := mistakes.errors_by_label(run):
        rates = {name: found.errors / found.rows for name, found in errors.items() if found.rows}
        worst = sorted(rates, key=lambda name: -rates[name])[:_MOST_LABELS]
        shown = {"share of wrong rows": {name: rates[name] for name in worst}}
        yield "errors", plots.draw_amounts(shown, title="Errors by label")
