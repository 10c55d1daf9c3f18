"""The comparison of several runs."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs

from tunerkit.errors import cut
from tunerkit_cli.report import curves, scores, wording
from tunerkit_cli.report.curves import Curve, Panel
from tunerkit_cli.report.html import tables
from tunerkit_cli.report.html.grids import capped, heatmap, highest_rank, rank_summary
from tunerkit_cli.report.html.page import drawn, filled
from tunerkit_cli.report.html.tables import NONE, Table
from tunerkit_cli.report.record import RecordError, Run, read
from tunerkit_cli.report.verdict import failure, verdict


def compare(records: Mapping[str, Mapping[str, Any]], *, title: str | None = None) -> str:
    """Return a comparison of runs, by the names to show, as one HTML file. Raises `RecordError` for fewer than two."""
    if len(records) < 2:
        raise RecordError(f"expected two runs or more to compare, got {len(records)}; `render` shows a single one")
    runs = {name: read(record, cut(name, 200)) for name, record in records.items()}
    known = [_conditions(run) for run in runs.values()]
    names = dict.fromkeys(name for each in known for name in each)
    differing = " and ".join(name for name in names if len({each[name] for each in known if name in each}) > 1)
    warning = f"The runs differ in their {differing}, so their metrics are not comparable." if differing else ""
    metrics = _metrics(runs)
    table = Table(metrics.columns, (*metrics.rows, *_costs(runs)), frozenset() if warning else metrics.best)
    highest = max(map(highest_rank, runs.values()))
    values = {
        "title": title or f"{len(runs)} runs compared",
        "runs": runs,
        "failures": {name: text for name, run in runs.items() if (text := failure(run.problems))},
        "verdicts": {name: verdict(run) for name, run in runs.items()},
        "best": "" if warning else _best(runs),
        "warning": warning,
        "results": table if table.rows else None,
        "curves": drawn(_panels(runs)),
        "differences": _differences(runs),
        "ranks": {
            name: (heatmap(run, highest), rank_summary(run), capped(run)) for name, run in runs.items() if run.ranks
        },
        "highest": highest,
    }
    return filled("comparison.html.j2", values)


def _conditions(run: Run) -> dict[str, str]:
    """Under which conditions metrics were measured: a loss by the token depends on what tokens are, and which count."""
    rows = run.rows.get("eval")
    found = {"task": run.task, "held-out data": f"{run.data.get('eval', NONE)}{f', {rows:,} rows' if rows else ''}"}
    if run.task in ("causal-lm", "seq2seq"):
        found["base model"] = str(run.model.get("name", NONE))
    if run.task == "causal-lm":  # earlier versions learned whole conversations, and have no such key
        prompts = run.recipe.get("train_on_prompts", run.conversations)
        found["learned tokens"] = "prompts learned too" if prompts else "prompts not learned"
    return found


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


def _metrics(runs: Mapping[str, Run]) -> Table:
    """Return the metrics, a row for each and a column per run, with the best values marked."""
    names = list(dict.fromkeys(name for run in runs.values() for name in run.metrics))
    rows: list[tuple[str, ...]] = []
    best: set[tuple[int, int]] = set()
    for number, name in enumerate(names):
        values = {column: run.metrics[name] for column, run in enumerate(runs.values(), 1) if name in run.metrics}
        texts = (wording.decimals(values[k], 4) if k in values else NONE for k in range(1, len(runs) + 1))
        rows.append((scores.title(name), *texts))
        run = next(run for run in runs.values() if name in run.metrics)
        top = max(values.values()) if scores.is_better_high(name, run) else min(values.values())
        if len(set(values.values())) > 1:
            best |= {(number, column) for column, value in values.items() if value == top}
    return Table(("", *runs), tuple(rows), best=frozenset(best))


def _costs(runs: Mapping[str, Run]) -> Iterator[tuple[str, ...]]:
    def texts(value_of: Callable[[Run], Any], write: Callable[[Any], str] = str) -> list[str]:
        return [NONE if (value := value_of(run)) is None else write(value) for run in runs.values()]

    costs = {
        "method": texts(lambda run: run.method, wording.method_title),
        "trained parameters": texts(lambda run: run.parameters.trained, wording.number),
        "optimizer steps": texts(lambda run: run.steps, wording.number),
        "precision": texts(lambda run: run.precision or None),
        "training time": texts(lambda run: run.seconds.get("train"), wording.duration),
    }
    return ((title, *found) for title, found in costs.items() if {*found} != {NONE})


def _panels(runs: Mapping[str, Run]) -> Iterator[Panel]:
    """Yield a panel for each curve that two runs or more have; losses and metrics of different tasks have their own."""
    found = {name: curves.panels(run) for name, run in runs.items()}
    same: dict[tuple[str, str, str], tuple[Panel, list[Curve]]] = {}
    for name, panels in found.items():
        for panel in panels:
            for curve in panel.curves:
                if curve.style not in ("faint", "mark") and curve.name not in ("least", "greatest"):
                    what = curve.name.partition(",")[0]  # "training, smoothed" is "training" where it is short
                    task = runs[name].task if panel.name.startswith(("loss", "metric-")) else ""
                    _, lines = same.setdefault((panel.name, what, task), (panel, []))
                    lines.append(Curve(name, curve.points, curve.style))
    several = len({run.task for run in runs.values()}) > 1
    for (_, what, task), (panel, lines) in same.items():
        if len(lines) > 1:
            is_named = what.lower() in panel.title.lower()
            title = f"{panel.title}{'' if is_named else f', {what}'}{f', {task}' if several and task else ''}"
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
    rows = [(name, *(settings.get(name, NONE) for settings in found)) for name in names]
    return tables.shortened(("setting", *runs), [row for row in rows if len(set(row[1:])) > 1])
