"""The report of one run, and the templates of all pages, filled in."""

import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import jinja2

from tunerkit_cli.report import curves, scores, wording
from tunerkit_cli.report.curves import Panel
from tunerkit_cli.report.html import facts, tables
from tunerkit_cli.report.html.charts import chart
from tunerkit_cli.report.html.grids import MOST_LABELS, confusion_matrix
from tunerkit_cli.report.rank_map import by_layer, by_matrix, parts_of
from tunerkit_cli.report.record import Run, read
from tunerkit_cli.report.verdict import failure, verdict

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
        "facts": [*facts.facts(run)],
        "results": tables.results(run),
        "curves": drawn(panel for panel in panels if panel.name not in _OF_RANKS),
        "evaluations": tables.evaluations(run),
        "rank_curves": drawn(panel for panel in panels if panel.name in _OF_RANKS),
        "heatmap": facts.rank_heatmap(run),
        "rank_summary": facts.rank_summary(run),
        "highest": facts.highest_rank(run),
        "capped": facts.capped(run),
        "parts": facts.parts(run),
        "matrices": by_matrix(run.sizes),
        "layers": by_layer(run.sizes),
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


def _mistakes(run: Run) -> dict[str, Any]:
    """Draw the confusion matrix, or errors by label where it is too large."""
    names, is_large = scores.label_names(run), len(run.confusion) > MOST_LABELS
    lines = [*zip(names, run.confusion, strict=True)] if is_large else []
    errors = {name: sum(line) - line[n] for n, (name, line) in enumerate(lines)}
    rates = {name: errors[name] / sum(line) if any(line) else 0.0 for name, line in lines}
    ordered = list(rates) if len(rates) <= _MOST_ERRORS else sorted(rates, key=lambda name: -rates[name])
    return {
        "confusion": confusion_matrix(run.confusion, names) if len(run.confusion) > 1 and not is_large else None,
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
