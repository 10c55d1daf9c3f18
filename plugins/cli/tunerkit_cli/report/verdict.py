"""The verdict on a run, in one sentence."""

from collections.abc import Sequence
from statistics import fmean
from typing import Final, Literal

import attrs

from tunerkit_cli.report import curves, scores, wording
from tunerkit_cli.report.record import Problem, Run

_LEVEL: Final = 0.0005  # scores closer than this are called level


@attrs.frozen
class Verdict:
    """A sentence, and whether the run did better or worse than its baseline, or neither is known."""

    text: str
    outcome: Literal["better", "worse", "open"]


def verdict(run: Run) -> Verdict:
    """Say how good the result is, by which share of the parameters, and compared with what."""
    metric = scores.main_metric(run.metrics, run.main_metric)
    if metric is None:
        return Verdict(_without_metrics(run), "open")
    named = "a loss of" if metric == "loss" else scores.title(metric)
    reached = f"{wording.method_title(run.method)} reaches {named} {wording.decimals(run.metrics[metric])}"
    rows, share = run.rows.get("eval"), trained_share(run)
    on = "the held-out rows" if rows is None else f"{rows:,} held-out row{'' if rows == 1 else 's'}"
    trained = "" if share is None else f" with {wording.percent(share)} of the parameters trained"
    compared, outcome = _comparison(run, metric)
    return Verdict(f"{reached} on {on}{trained}{compared}.", outcome)


def failure(problems: Sequence[Problem]) -> str:
    """Say in a sentence what is wrong with a run, and what to try; empty without problems."""
    if not problems:
        return ""
    ordered = sorted(problems, key=lambda problem: not problem.fatal)
    said = "; ".join(problem.text for problem in ordered)
    advice = next((f"; try {problem.advice}" for problem in ordered if problem.advice), "")
    return f"this run {'did not learn' if ordered[0].fatal else 'learned less than it should'}: {said}{advice}"


def baseline_name(what: str) -> str:
    """Return the baseline's short name with an article: "the head alone"."""
    name = wording.short_baseline(what)
    return name if name.lower().startswith(("the ", "a ", "an ")) else f"the {name}"


def _comparison(run: Run, metric: str) -> tuple[str, Literal["better", "worse", "open"]]:
    if run.baseline is None or metric not in run.baseline.metrics:
        return "", "open"
    name = baseline_name(run.baseline.what)
    difference = run.metrics[metric] - run.baseline.metrics[metric]
    if abs(difference) < _LEVEL * (1 if scores.is_share(metric) else abs(run.baseline.metrics[metric])):
        return f", level with {name}", "open"
    is_better = (difference > 0) == scores.is_better_high(metric, run)
    side = "above" if difference > 0 else "below"
    judged = "" if is_better and difference > 0 else ", which is better" if is_better else ", which is worse"
    return f", {scores.distance(metric, difference)} {side} {name}{judged}", "better" if is_better else "worse"


def trained_share(run: Run) -> float | None:
    """Return the share of all parameters that were trained, if the record says so."""
    found = run.parameters
    return found.trained / found.all if found.trained is not None and found.all else None


def _without_metrics(run: Run) -> str:
    share = trained_share(run)
    what = "an adapter" if share is None else f"{wording.percent(share)} of the parameters"
    steps = "" if run.steps is None else f" for {run.steps:,} step{'' if run.steps == 1 else 's'}"
    said = f"{wording.method_title(run.method)} trained {what}{steps} without held-out rows"
    panel = curves.loss(run)
    values = [y for _, y in panel.curves[0].points] if panel is not None and panel.curves[0].style != "dots" else []
    if not values:
        return f"{said}."
    part = max(1, len(values) // 20)  # one row of the logs is noisy
    start, end = fmean(values[:part]), fmean(values[-part:])
    first, last = wording.decimals(start), wording.decimals(end)
    if first == last:
        return f"{said}; the training loss stayed at {last}."
    return f"{said}; the training loss {'fell' if end < start else 'rose'} from {first} to {last}."
