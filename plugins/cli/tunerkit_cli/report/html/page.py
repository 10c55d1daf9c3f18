"""The report of one run."""

from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any, Final

from tunerkit_cli.report import curves, mistakes, shares, wording
from tunerkit_cli.report.curves import Panel
from tunerkit_cli.report.html import tables
from tunerkit_cli.report.html.bars import bars, columns
from tunerkit_cli.report.html.facts import facts
from tunerkit_cli.report.html.grid import Grid
from tunerkit_cli.report.html.heatmap import MOST_CELLS, heatmap
from tunerkit_cli.report.html.lines import Chart, chart
from tunerkit_cli.report.html.loading import loading
from tunerkit_cli.report.html.matrix import MOST_LABELS, matrix
from tunerkit_cli.report.html.template import filled
from tunerkit_cli.report.record import Run, read
from tunerkit_cli.report.verdict import failure, verdict

_OF_RANKS: Final = ("rank", "budget")
_MOST_PAIRS: Final = 10
_MOST_ERRORS: Final = 30
_MOST_SAMPLES: Final = 12
_LONGEST_SAMPLE: Final = 3000


def render(record: Mapping[str, Any], *, title: str | None = None) -> str:
    """Return the report of a run as one HTML file, which needs no network. A section that says nothing is left out.

    Args:
        record: The record of the run, as ``run.json`` has it.
        title: The heading; by default the method and the model.

    Returns:
        The page, with everything from the record escaped. It has no script.

    Raises:
        RecordError: The record is damaged, or of another version.
    """
    run = read(record)
    panels = curves.panels(run)
    values = {
        "title": title or default_title(run),
        "run": run,
        "about": about(run),
        "failure": wording.capitalised(failure(run.problems)),
        "verdict": verdict(run),
        "facts": facts(run),
        "results": tables.results(run),
        "curves": drawn(panel for panel in panels if panel.name not in _OF_RANKS),
        "evaluations": tables.evaluations(run),
        "rank_curves": drawn(panel for panel in panels if panel.name in _OF_RANKS),
        "heatmap": rank_heatmap(run),
        "rank_summary": rank_summary(run),
        "highest": highest_rank(run),
        "capped": capped(run),
        "parts": _parts(run),
        **_shares(run),
        "spectrum": _spectrum(run),
        "confusion": _confusion(run),
        **_mistakes(run),
        "labels": tables.labels(run),
        "samples": _samples(run),
        "targets": tables.targets(run),
        "details": _details(run),
        "loading": loading(run),
    }
    return filled("run.html.j2", values)


def drawn(panels: Iterable[Panel]) -> list[Chart]:
    """Draw panels with the same x-axis."""
    shown = list(panels)
    steps = [x for panel in shown for curve in panel.curves for x, _ in curve.points]
    ends = (min(steps), max(steps)) if steps else ()
    return [chart(panel, x_values=ends) for panel in shown]


def default_title(run: Run) -> str:
    """Return the method and the model, as far as they are known."""
    model = model_name(run)
    return f"{wording.method_title(run.method)} on {model}" if model else wording.method_title(run.method)


def model_name(run: Run) -> str:
    """Return the model's name, else its path without the folders above it; empty if neither is known."""
    name = run.model.get("name") or str(run.model.get("path") or "").rstrip("/").rpartition("/")[2]
    return str(name)


def about(run: Run) -> tuple[str, ...]:
    """Return the task and the data, for the line below the heading."""
    train, held_out = run.data.get("train"), run.data.get("eval")
    found = [run.task, f"trained on {train}" if train else "", f"held out: {held_out}" if held_out else ""]
    return tuple(text for text in found if text)


def highest_rank(run: Run) -> int:
    """Return the rank with the full colour: the greatest that a target has, had or may have."""
    had = (max(change.ranks, default=0) for change in run.history)
    return max((*run.ranks.values(), *(run.caps.get(path, 0) for path in run.ranks), *had), default=1) or 1


def rank_heatmap(run: Run, highest: int | None = None) -> Grid | None:
    """Draw the ranks if they differ."""
    if len(set(run.ranks.values())) < 2:
        return None
    shown = dict(list(run.ranks.items())[:MOST_CELLS])
    return heatmap(shown, telling_caps(run), highest=highest or highest_rank(run))


def capped(run: Run) -> int:
    """Return how many targets have the greatest rank that they may have."""
    return sum(0 < cap <= run.ranks[path] for path, cap in telling_caps(run).items())


def telling_caps(run: Run) -> Mapping[str, int]:
    """Return the caps of the targets; none if all have their greatest rank, as without a budget."""
    caps = {path: cap for path, cap in run.caps.items() if path in run.ranks}
    return {} if caps == run.ranks else caps


def rank_summary(run: Run) -> str:
    """Say in a sentence how the ranks are distributed; empty without ranks."""
    if not run.ranks:
        return ""
    ranks = list(run.ranks.values())
    gone = sum(rank == 0 for rank in ranks)
    full = capped(run)
    low, high = min(ranks), max(ranks)
    spread = f"{low} each" if low == high else f"{fmean(ranks):.1f} on average, from {low} to {high}"
    parts = [f"{sum(ranks):,} live ranks in {len(ranks):,} matrices: {spread}"]
    parts += [f"{full} at their cap"] if full else []
    parts += [f"{gone} without any"] if gone else []
    parts += [f"the first {MOST_CELLS:,} matrices are shown"] if len(ranks) > MOST_CELLS else []
    return f"{'; '.join(parts)}."


def _parts(run: Run) -> str:
    """Say what the trained parameters belong to; empty if the record doesn't."""
    found = run.parameters
    named = {"adapters": found.adapters, "copies of modules": found.copies, "biases": found.biases}
    known = [f"{count:,} in {name}" for name, count in named.items() if count]
    return f"Trained parameters: {', '.join(known)}." if known else ""


def _shares(run: Run) -> dict[str, Any]:
    matrices, layers = shares.by_matrix(run.sizes), shares.by_layer(run.sizes)
    return {
        "matrix_bars": bars(matrices, shares.parts_of(matrices)),
        "layer_columns": columns("By layer", "layer", layers) if layers else None,
    }


def _spectrum(run: Run) -> Chart | None:
    panel = curves.spectrum(run)
    return None if panel is None else chart(panel)


def _confusion(run: Run) -> Grid | None:
    return matrix(run.confusion, mistakes.label_names(run)) if 1 < len(run.confusion) <= MOST_LABELS else None


def _mistakes(run: Run) -> dict[str, Any]:
    """Return errors by label where there is no drawn matrix, or where the record has errors of its own."""
    errors = mistakes.errors_by_label(run) if run.errors or len(run.confusion) > MOST_LABELS else {}
    rates = {name: found.errors / found.rows if found.rows else 0.0 for name, found in errors.items()}
    ordered = list(rates) if len(rates) <= _MOST_ERRORS else sorted(rates, key=lambda name: -rates[name])
    shown = ordered[:_MOST_ERRORS]
    return {
        "errors": bars({name: errors[name].errors for name in shown}, rates, colour=1),
        "errors_left_out": len(ordered) - len(shown),
        "confused": mistakes.most_confused(run, _MOST_PAIRS) if len(run.confusion) > 2 else (),
    }


def _samples(run: Run) -> list[dict[str, str | None]]:
    def cut(text: str | None) -> str | None:
        return None if text is None else wording.short_text(text, _LONGEST_SAMPLE)

    return [
        {"prompt": cut(sample.prompt), "before": cut(sample.before), "after": cut(sample.after)}
        for sample in run.samples[:_MOST_SAMPLES]
    ]


def _details(run: Run) -> dict[str, tables.Table]:
    described = (("model", run.model), ("data", run.data), ("held-out rows", run.held_out))
    found = {
        "Settings of the method": tables.settings(run.config),
        "Recipe": tables.settings({key: value for key, value in run.recipe.items() if key != "config"}),
        "Model and data": tables.settings({name: values for name, values in described if values}),
        "Environment": tables.settings(run.environment),
    }
    return {name: table for name, table in found.items() if table is not None}
