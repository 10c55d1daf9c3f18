"""The tables of a report, as texts."""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs

from tunerkit_cli.report import scores, wording
from tunerkit_cli.report.record import Baseline, Run

_MOST_ROWS: Final = 400
_MOST_EVALUATIONS: Final = 50
_MOST_METRICS: Final = 12
_MOST_LABELS: Final = 30
_LONGEST_SETTING: Final = 500
# Trainers take these, and a report is made to be passed on.
_SECRETS: Final = frozenset({"token", "hub_token", "access_token", "auth_token", "api_key", "password", "secret"})
NONE: Final = "–"


@attrs.frozen
class Table:
    """Column heads and rows of texts. ``best`` holds the cells to mark, as (row, column); ``left_out`` counts rows."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: frozenset[tuple[int, int]] = frozenset()
    left_out: int = 0


def results(run: Run) -> Table | None:
    """Return the metrics, with those of the baseline beside them if one ran."""
    if not run.metrics:
        return None
    names = sorted(run.metrics, key=lambda name: name != scores.main_metric(run.metrics, run.main_metric))
    own = {name: wording.decimals(run.metrics[name], 4) for name in names}
    if run.baseline is None:
        return Table(("metric", "held-out rows"), tuple((scores.title(name), own[name]) for name in names))
    rows = [(scores.title(name), own[name], *_beside(run, name, run.baseline)) for name in names]
    costs = (("trained parameters", run.parameters.trained, run.baseline.parameters, wording.number),)
    times = (("training time", run.seconds.get("train"), run.baseline.seconds, wording.duration),)
    for title, mine, its, written in (*costs, *times):
        if mine is not None and its is not None:
            rows.append((title, written(mine), written(its), wording.times(mine / its) if its else NONE))
    heads = ("metric", wording.method_title(run.method), wording.short_baseline(run.baseline.what), "difference")
    return Table(heads, tuple(rows))


def evaluations(run: Run) -> Table | None:
    """Return what was measured on held-out rows while training ran; None if that was once or never."""
    rows = [row for row in run.logs if any(key.startswith("eval_") for key in row) and "step" in row]
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith("eval_"))
    names = [key for key in keys if not key.endswith(("runtime", "per_second", "preparation_time"))][:_MOST_METRICS]
    if len(rows) < 2 or not names:
        return None
    shown = rows[-_MOST_EVALUATIONS:]
    lines = [(_text(row["step"]), *(_measured(row.get(name)) for name in names)) for row in shown]
    heads = ("step", *(scores.title(name.removeprefix("eval_")) for name in names))
    return Table(heads, tuple(lines), left_out=len(rows) - len(shown))


def targets(run: Run) -> Table | None:
    """Return what is known of each target: rank, cap, live parameters and spectrum."""
    paths = list(dict.fromkeys([*run.ranks, *run.sizes, *run.spectrum]))
    columns: dict[str, Mapping[str, str]] = {
        "experts": {path: wording.number(count) for path, count in run.stacks.items()},
        "rank": {path: wording.number(rank) for path, rank in run.ranks.items()},
        "cap": {path: wording.number(cap) for path, cap in run.caps.items()},
        "parameters": {path: wording.number(size) for path, size in run.sizes.items()},
        "greatest singular value": {path: wording.number(max(v)) for path, v in run.spectrum.items() if v},
        "values for 90 %": {path: str(_needed(values, 0.9)) for path, values in run.spectrum.items() if any(values)},
    }
    known = {name: texts for name, texts in columns.items() if texts}
    rows = [(path, *(texts.get(path, NONE) for texts in known.values())) for path in paths if known]
    return shortened(("target", *known), rows)


def labels(run: Run) -> Table | None:
    """Return recall, precision and F1 of each label, from the confusion matrix."""
    names = scores.label_names(run)
    if not 1 < len(run.confusion) <= _MOST_LABELS:
        return None
    rows = []
    for name, (count, *ratios) in zip(names, scores.label_scores(run), strict=True):
        rows.append((name, wording.number(count), *(NONE if ratio is None else f"{ratio:.3f}" for ratio in ratios)))
    return Table(("label", "rows", "recall", "precision", "F1"), tuple(rows))


def settings(values: Mapping[str, Any]) -> Table | None:
    """Return settings with their values; nested ones have dotted names."""
    return shortened(("setting", "value"), list(flattened(values).items()))


def shortened(columns: Sequence[str], rows: Sequence[tuple[str, ...]]) -> Table | None:
    """Return a table of the first rows, which counts the others; None without rows."""
    shown = tuple(rows[:_MOST_ROWS])
    return Table(tuple(columns), shown, left_out=len(rows) - len(shown)) if rows else None


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return settings as texts, by dotted names."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if name.lower() in _SECRETS and value is not None:
            found[f"{prefix}{name}"] = "(hidden)"
        elif isinstance(value, Mapping) and value:
            found |= flattened(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = wording.short_text(_text(value), _LONGEST_SETTING)
    return found


def _measured(value: object) -> str:
    return wording.decimals(value, 4) if isinstance(value, float) else _text(value)


def _text(value: object) -> str:
    if value is None or value == {} or value == []:
        return NONE
    if isinstance(value, float):
        return wording.number(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _beside(run: Run, name: str, baseline: Baseline) -> tuple[str, str]:
    """Return a metric of the baseline, and how the run's differs from it."""
    if name not in baseline.metrics:
        return NONE, NONE
    value = wording.decimals(baseline.metrics[name], 4)
    difference = run.metrics[name] - baseline.metrics[name]
    if difference == 0:
        return value, "none"
    is_better = (difference > 0) == scores.is_better_high(name, run)
    return value, f"{scores.signed(name, difference)}, {'better' if is_better else 'worse'}"


def _needed(values: Sequence[float], share: float) -> int:
    """Return how many of the greatest singular values hold a share of the sum of all squares."""
    squares = sorted((value * value for value in values), reverse=True)
    wanted = share * sum(squares)
    return next(count for count, held in enumerate(itertools.accumulate(squares), 1) if held >= wanted)
