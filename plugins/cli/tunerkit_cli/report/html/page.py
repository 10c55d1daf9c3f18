"""The report of one run, and the templates of all pages, filled in."""

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import jinja2

from tunerkit_cli.report import curves, scores, wording
from tunerkit_cli.report.curves import Panel
from tunerkit_cli.report.html import grids, tables
from tunerkit_cli.report.html.charts import chart
from tunerkit_cli.report.rank_map import by_matrix_and_layer, parts_of
from tunerkit_cli.report.record import Run, read
from tunerkit_cli.report.verdict import baseline_name, failure, verdict

_OF_RANKS: Final = ("rank", "budget")
_MOST_PAIRS: Final = 10
_MOST_ERRORS: Final = 30
_TEMPLATES: Final = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {"short": wording.short_text, "number": wording.number, "percent": wording.percent}
_TEMPLATES.filters["parts_of"] = parts_of
_CONTROLS: Final = {*range(0x20), *range(0x7F, 0xA0), 0xFFFE, 0xFFFF} - {0x9, 0xA, 0xD}
_UNPRINTABLE: Final = dict.fromkeys(_CONTROLS, "\N{REPLACEMENT CHARACTER}")


def render(record: Mapping[str, Any], *, title: str | None = None) -> str:
    """Return the report of a run as one HTML file, which needs no network and has no script. Raises `RecordError`."""
    run = read(record)
    panels, spectrum = curves.panels(run), curves.spectrum(run)
    matrices, layers = by_matrix_and_layer(run.sizes)
    out = run.recipe.get("out")
    folder = out if isinstance(out, str) and out else "OUT"
    # By its path in records of earlier versions.
    model = run.model.get("name") or str(run.model.get("path") or "").rstrip("/").rpartition("/")[2]
    method = wording.method_title(run.method)
    values = {
        "title": title or (f"{method} on {model}" if model else method),
        "run": run,
        "failure": wording.capitalised(failure(run.problems)),
        "verdict": verdict(run),
        "facts": [*_facts(run)],
        "results": tables.results(run),
        "curves": drawn(panel for panel in panels if panel.name not in _OF_RANKS),
        "evaluations": tables.evaluations(run),
        "rank_curves": drawn(panel for panel in panels if panel.name in _OF_RANKS),
        "heatmap": grids.heatmap(run),
        "rank_summary": grids.rank_summary(run),
        "highest": grids.highest_rank(run),
        "capped": grids.capped(run),
        "parts": _parts(run),
        "matrices": matrices,
        "layers": layers,
        "spectrum": None if spectrum is None else chart(spectrum),
        **_mistakes(run),
        "labels": tables.labels(run),
        "targets": tables.targets(run),
        "details": _details(run),
        "folder": json.dumps(folder, ensure_ascii=False),
        "quoted_folder": shlex.quote(folder),
    }
    return filled("run.html.j2", values)


def drawn(panels: Iterable[Panel]) -> list[dict[str, Any]]:
    """Draw panels with the same x-axis."""
    shown = list(panels)
    steps = [x for panel in shown for curve in panel.curves for x, _ in curve.points]
    return [chart(panel, x_values=(min(steps), max(steps))) for panel in shown]


def filled(name: str, values: dict[str, Any]) -> str:
    """Fill in a template. Values are escaped, and characters that HTML forbids are replaced."""
    page = _TEMPLATES.get_template(name).render(values)
    # A lone surrogate in a label could not be written as UTF-8.
    return page.encode("utf-8", "replace").decode("utf-8").translate(_UNPRINTABLE)


def _facts(run: Run) -> Iterator[tuple[str, str, str]]:
    """Yield the key figures that the record has, each with its name and a note."""
    metric = scores.main_metric(run.metrics, run.main_metric)
    if metric is not None:
        note, value = "", run.metrics[metric]
        if run.baseline is not None and metric in run.baseline.metrics:
            difference = scores.signed(metric, value - run.baseline.metrics[metric])
            note = f"{difference} vs. {baseline_name(run.baseline.what)}"
        yield wording.capitalised(scores.title(metric)), wording.decimals(value), note
    found, budget = run.parameters, run.budget
    if found.trained is not None:
        of = "" if not found.all else f"{wording.percent(found.trained / found.all)} of {wording.count(found.all)}"
        yield "Trained parameters", wording.count(found.trained), of
    if budget is not None and budget.end is not None and budget.end != budget.start:
        notes = [f"{wording.number(budget.start)} at the start"] if budget.start is not None else []
        if budget.live is not None and budget.live != budget.end:
            notes.append(f"{wording.number(budget.live)} live")
        yield f"Budget ({budget.unit})", wording.number(budget.end), ", ".join(notes)
    elif run.ranks:
        low, high = min(run.ranks.values()), max(run.ranks.values())
        yield "Rank", str(low) if low == high else f"{low} to {high}", f"in {len(run.ranks):,} matrices"
    if "train" in run.rows:
        held_out = run.rows.get("eval")
        notes = [f"{held_out:,} held out" if held_out else "none held out"]
        if missing := sum(count for reasons in run.left_out.values() for count in reasons.values()):
            notes.append(f"{missing:,} left out")
        yield "Training rows", f"{run.rows['train']:,}", ", ".join(notes)
    if run.steps is not None:
        epochs = max((row["epoch"] for row in run.logs if isinstance(row.get("epoch"), int | float)), default=None)
        note = f"{wording.number(epochs)} {'epoch' if epochs == 1 else 'epochs'}" if epochs else ""
        yield "Optimizer steps", f"{run.steps:,}", note
    if "train" in run.seconds:
        evaluated = run.seconds.get("evaluate")
        notes = [f"on {run.device}"] if run.device else []
        notes += [f"in {run.precision}"] if run.precision else []
        notes += [f"{wording.duration(evaluated)} to evaluate"] if evaluated is not None else []
        yield "Training time", wording.duration(run.seconds["train"]), ", ".join(notes)


def _parts(run: Run) -> str:
    """Say what the trained parameters belong to; empty if the record doesn't."""
    found = run.parameters
    named = {"adapters": found.adapters, "copies of modules": found.copies, "biases": found.biases}
    known = [f"{count:,} in {name}" for name, count in named.items() if count]
    return f"Trained parameters: {', '.join(known)}." if known else ""


def _mistakes(run: Run) -> dict[str, Any]:
    """Draw the confusion matrix, or errors by label where it is too large."""
    names, is_large = scores.label_names(run), len(run.confusion) > grids.MOST_LABELS
    lines = [*zip(names, run.confusion, strict=True)] if is_large else []
    errors = {name: sum(line) - line[n] for n, (name, line) in enumerate(lines)}
    rates = {name: errors[name] / sum(line) if any(line) else 0.0 for name, line in lines}
    ordered = list(rates) if len(rates) <= _MOST_ERRORS else sorted(rates, key=lambda name: -rates[name])
    return {
        "confusion": grids.confusion_matrix(run.confusion, names) if len(run.confusion) > 1 and not is_large else None,
        "errors": {name: errors[name] for name in ordered[:_MOST_ERRORS]},
        "error_rates": rates,
        "errors_left_out": max(len(ordered) - _MOST_ERRORS, 0),
        "confused": scores.most_confused(run, _MOST_PAIRS) if len(run.confusion) > 2 else (),
    }


def _details(run: Run) -> dict[str, tables.Table]:
    described = (("model", run.model), ("data", run.data), ("held-out rows", run.held_out))
    found = {
        "Settings of the method": tables.settings(run.config),
        "Recipe": tables.settings({key: value for key, value in run.recipe.items() if key != "config"}),
        "Model and data": tables.settings({name: values for name, values in described if values}),
        "Environment": tables.settings(run.environment),
    }
    return {name: table for name, table in found.items() if table is not None}
