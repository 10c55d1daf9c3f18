"""The comparison of several runs."""

from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from tunerkit.errors import cut
from tunerkit.report import curves, scores, wording
from tunerkit.report.curves import Curve, Panel
from tunerkit.report.html import tables
from tunerkit.report.html.page import capped, drawn, highest_rank, rank_heatmap, rank_summary
from tunerkit.report.html.tables import Table
from tunerkit.report.html.template import filled
from tunerkit.report.record import RecordError, Run, read
from tunerkit.report.verdict import failure, verdict

_NONE = "–"


def compare(records: Mapping[str, Mapping[str, Any]], *, title: str | None = None) -> str:
    """Return a comparison of runs as one HTML file: metrics, curves, settings that differ, and ranks.

    Args:
        records: The records of two runs or more, each as ``run.json`` has it, by the names to show.
        title: The heading.

    Raises:
        RecordError: A record is damaged or of another version, or there are fewer than two.
    """
    if len(records) < 2:
        raise RecordError(f"expected two runs or more to compare, got {len(records)}; `render` shows a single one")
    runs = {name: _read(name, record) for name, record in records.items()}
    highest = max(map(highest_rank, runs.values()))
    values = {
        "title": title or f"{len(runs)} runs compared",
        "runs": runs,
        "failures": {name: text for name, run in runs.items() if (text := failure(run.problems))},
        "verdicts": {name: verdict(run) for name, run in runs.items()},
        "best": _best(runs),
        "warning": _warning(runs),
        "results": _results(runs),
        "curves": drawn(_panels(runs)),
        "differences": _differences(runs),
        "ranks": {
            name: (rank_heatmap(run, highest), rank_summary(run), capped(run))
            for name, run in runs.items()
            if run.ranks
        },
        "highest": highest,
    }
    return filled("comparison.html.j2", values)


def _read(name: str, record: Mapping[str, Any]) -> Run:
    try:
        return read(record)
    except RecordError as problem:
        raise RecordError(f"{cut(name, 200)}: {problem}") from problem


def _best(runs: Mapping[str, Run]) -> str:
    """Say which run is the best by the metric that most have as their main one; empty if fewer than two have it."""
    mains = [scores.main_metric(run.metrics, run.main_metric) for run in runs.values()]
    metric = max((name for name in mains if name is not None), key=mains.count, default=None)
    found = {name: run.metrics[metric] for name, run in runs.items() if metric in run.metrics} if metric else {}
    if metric is None or len(found) < 2:
        return ""
    is_high = scores.is_better_high(metric, next(run for run in runs.values() if metric in run.metrics))
    ordered = sorted(found, key=lambda name: found[name], reverse=is_high)
    first, second = ordered[:2]
    value, gap = wording.decimals(found[first]), abs(found[first] - found[second])
    if gap == 0:
        return f"{first} and {second} are level with {scores.title(metric)} {value}."
    side = "above" if is_high else "below"
    what = "highest" if is_high else "lowest"
    return f"{first} has the {what} {scores.title(metric)}, {value}, {scores.distance(metric, gap)} {side} {second}."


def _warning(runs: Mapping[str, Run]) -> str:
    """Say what makes the metrics incomparable; empty if nothing does."""
    known: dict[str, list[object]] = {
        "task": [run.task for run in runs.values()],
        "held-out data": [(run.data.get("eval"), run.rows.get("eval")) for run in runs.values()],
    }
    differing = [name for name, values in known.items() if len({str(value) for value in values}) > 1]
    if not differing:
        return ""
    return f"The runs differ in their {' and '.join(differing)}, so their metrics are not directly comparable."


def _results(runs: Mapping[str, Run]) -> Table:
    """Return metrics and costs, a row for each and a column per run, with the best values marked."""
    names = list(dict.fromkeys(name for run in runs.values() for name in run.metrics))
    rows: list[tuple[str, ...]] = []
    best: set[tuple[int, int]] = set()
    for number, name in enumerate(names):
        values = {column: run.metrics[name] for column, run in enumerate(runs.values(), 1) if name in run.metrics}
        texts = (wording.decimals(values[k], 4) if k in values else _NONE for k in range(1, len(runs) + 1))
        rows.append((scores.title(name), *texts))
        run = next(run for run in runs.values() if name in run.metrics)
        top = max(values.values()) if scores.is_better_high(name, run) else min(values.values())
        if len(set(values.values())) > 1:
            best |= {(number, column) for column, value in values.items() if value == top}
    return Table(("", *runs), (*rows, *_costs(runs)), best=frozenset(best))


def _costs(runs: Mapping[str, Run]) -> Iterator[tuple[str, ...]]:
    times = [run.seconds.get("train") for run in runs.values()]
    costs: dict[str, list[str]] = {
        "method": [wording.method_title(run.method) for run in runs.values()],
        "trained parameters": [_text(run.parameters.trained) for run in runs.values()],
        "optimizer steps": [_text(run.steps) for run in runs.values()],
        "training time": [_NONE if seconds is None else wording.duration(seconds) for seconds in times],
    }
    return ((title, *texts) for title, texts in costs.items() if {*texts} != {_NONE})


def _text(value: float | None) -> str:
    return _NONE if value is None else wording.number(value)


def _panels(runs: Mapping[str, Run]) -> Iterator[Panel]:
    """Yield a panel for each curve that two runs or more have, with one curve from each run."""
    found = {name: curves.panels(run) for name, run in runs.items()}
    same: dict[tuple[str, str], tuple[Panel, list[Curve]]] = {}
    for name, panels in found.items():
        for panel in panels:
            for curve in panel.curves:
                if curve.style not in ("faint", "mark") and curve.name not in ("least", "greatest"):
                    what = curve.name.partition(",")[0]  # "training, smoothed" is "training" where it is short
                    _, lines = same.setdefault((panel.name, what), (panel, []))
                    lines.append(Curve(name, curve.points, curve.style))
    for (_, what), (panel, lines) in same.items():
        if len(lines) > 1:
            is_named = what.lower() in panel.title.lower()
            title = panel.title if is_named else f"{panel.title}, {what}"
            yield attrs.evolve(
                panel, title=title, curves=tuple(lines), is_log=panel.is_log and curves.is_logarithmic(lines)
            )


def _differences(runs: Mapping[str, Run]) -> Table | None:
    """Return the settings of method and recipe that are not the same in all runs."""
    found = [
        tables.flattened({"recipe": {k: v for k, v in run.recipe.items() if k != "config"}, "config": run.config})
        for run in runs.values()
    ]
    names = dict.fromkeys(name for settings in found for name in settings)
    rows = [(name, *(settings.get(name, _NONE) for settings in found)) for name in names]
    differing = tuple(row for row in rows if len(set(row[1:])) > 1)
    shown = differing[: tables.MOST_ROWS]
    return Table(("setting", *runs), shown, left_out=len(differing) - len(shown)) if differing else None
