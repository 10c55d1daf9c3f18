"""The curves of a run: what its logs and the history of its ranks say about each step."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import fmean, median
from typing import Final, Literal

import attrs

from tunerkit_cli.report import scores, wording
from tunerkit_cli.report.record import Points, Run

MOST_POINTS: Final = 400
_MOST_METRICS: Final = 6
_EVAL: Final = "eval_"
# A logarithmic axis ends at this share of the greatest value: below it there are only rounding errors.
_ROUNDING: Final = 1e-12
TINY: Final = 1e-100
_AT_LEAST_SMOOTHED: Final = 20  # shorter curves are shown as they are
# What a trainer logs besides metrics: times, counters, and the ranks, of which the record has the whole history.
_NO_METRICS: Final = frozenset(
    {"step", "epoch", "loss", "learning_rate", "grad_norm", "total_flos", "num_tokens", "num_input_tokens_seen"}
    | {"budget", "rank_mean", "rank_min", "rank_max"}
)
_NO_METRIC_ENDS: Final = ("runtime", "per_second", "preparation_time")


@attrs.frozen
class Curve:
    """A named curve. ``steps`` holds each value until the next one; ``mark`` is a value to compare with."""

    name: str
    points: Points
    style: Literal["line", "faint", "steps", "dots", "mark"] = "line"


@attrs.frozen
class Panel:
    """Curves that share their axes, and the texts beside them."""

    name: str
    title: str
    curves: tuple[Curve, ...]
    unit: str = ""
    x_title: str = "optimizer step"
    is_log: bool = False
    x_is_log: bool = False


def panels(run: Run) -> tuple[Panel, ...]:
    """Return the panels over optimizer steps that say something: loss, metrics, learning rate, budget and ranks."""
    found = (loss(run), *_metrics(run), *_schedule(run), *_rank_panels(run))
    return tuple(panel for panel in found if panel is not None)


def loss(run: Run) -> Panel | None:
    """Return the training loss, smoothed if it has many points, with the loss on held-out rows."""
    curves = _measured(run, "loss")
    return Panel("loss", "Loss", curves, is_log=is_logarithmic(curves)) if curves else None


def is_logarithmic(curves: Sequence[Curve]) -> bool:
    """Whether curves of positive values differ so much that a linear axis would show only the greatest."""
    values = [y for curve in curves for _, y in curve.points]
    least, greatest = min(values), max(values)
    return least > max(_ROUNDING * greatest, TINY) and greatest > 30 * least


def _rank_panels(run: Run) -> Iterator[Panel]:
    """Yield the mean, least and greatest rank over steps, and the budget; without what never changed."""
    if len({change.ranks for change in run.history}) > 1:
        summaries: dict[str, Callable[[Sequence[int]], float]] = {"greatest": max, "mean": fmean, "least": min}
        ranks = (
            Curve(name, thinned(tuple((float(c.step), float(summary(c.ranks))) for c in run.history)), "steps")
            for name, summary in summaries.items()
        )
        yield Panel("rank", "Rank of a matrix", tuple(ranks), unit="rank")
    budget = tuple((float(change.step), change.budget) for change in run.history if change.budget is not None)
    if len({value for _, value in budget}) > 1:
        unit = run.budget.unit if run.budget is not None else "rank"
        yield Panel("budget", "Budget in force", (Curve("budget", thinned(budget), "steps"),), unit=unit)


def spectrum(run: Run) -> Panel | None:
    """Return the sorted singular values of each target with their median; None if no target has two of them."""
    greatest = max((value for found in run.spectrum.values() for value in found), default=0.0)
    least = max(_ROUNDING * greatest, TINY)
    values = {path: sorted((v for v in found if v > least), reverse=True) for path, found in run.spectrum.items()}
    if max(map(len, values.values()), default=0) < 2:
        return None
    curves = [Curve(path, _numbered(found), "faint") for path, found in values.items() if found]
    columns = ([v for v in column if v is not None] for column in itertools.zip_longest(*values.values()))
    # Where most targets have no such value, the median of the others would rise again.
    middle = _numbered(median(column) for column in columns if 2 * len(column) >= len(curves))
    title = "Singular values of what each adapter adds"
    return Panel("spectrum", title, (*curves, Curve("median", middle)), x_title="singular value number", is_log=True)


def _numbered(values: Iterable[float]) -> Points:
    return tuple((float(n), value) for n, value in enumerate(values, 1))


def thinned(points: Points, limit: int = MOST_POINTS) -> Points:
    """Return at most ``limit`` of the points in their order: both ends, and the extremes of each stretch."""
    if len(points) <= limit:
        return points
    inner, stretches = points[1:-1], (limit - 2) // 2
    kept = [points[0]]
    for number in range(stretches):
        part = inner[number * len(inner) // stretches : (number + 1) * len(inner) // stretches]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return (*kept, points[-1])


def smoothed(points: Points) -> Points:
    """The mean of the points around each, a tenth of all, and fewer at the ends: a loss's start is steep."""
    sums = [0.0, *itertools.accumulate(value for _, value in points)]
    reach = max(1, len(points) // 20)
    means = []
    for number, (step, _) in enumerate(points):
        near = min(reach, max(number, reach // 4), max(len(points) - 1 - number, reach // 4))
        first, end = max(0, number - near), min(len(points), number + near + 1)
        means.append((step, (sums[end] - sums[first]) / (end - first)))
    return tuple(means)


def _measured(run: Run, name: str) -> tuple[Curve, ...]:
    """Return the values of training and those on held-out rows; nothing if neither has two points."""
    train, held_out = run.measured.get(name, ()), run.measured.get(f"{_EVAL}{name}", ())
    if max(len(train), len(held_out)) < 2:
        return ()
    curves = [Curve("training", train)] if train else []
    if len(train) >= _AT_LEAST_SMOOTHED:
        each = Curve("training, each log", thinned(train), "faint")
        curves = [each, Curve("training, smoothed", thinned(smoothed(train)))]
    return (*curves, *([Curve("held-out", thinned(held_out), "dots")] if held_out else []))


def _metrics(run: Run) -> Iterator[Panel]:
    """Yield a panel per metric with two points or more, the main one first; those on held-out rows before others."""
    names = sorted(filter(_is_metric, run.measured), key=lambda name: not name.startswith(_EVAL))
    ordered = dict.fromkeys(name.removeprefix(_EVAL) for name in names)
    main = scores.main_metric(run.metrics, run.main_metric)
    measured = ((name, _measured(run, name)) for name in sorted(ordered, key=lambda name: name != main))
    for name, curves in itertools.islice(((name, curves) for name, curves in measured if curves), _MOST_METRICS):
        if run.baseline is not None and name in run.baseline.metrics:
            steps = [step for curve in curves for step, _ in curve.points]
            level = run.baseline.metrics[name]
            mark = ((min(steps), level), (max(steps), level))
            curves = (*curves, Curve(wording.short_baseline(run.baseline.what), mark, "mark"))
        yield Panel(f"metric-{name}", wording.capitalised(scores.title(name)), curves)


def _schedule(run: Run) -> Iterator[Panel]:
    for name, title in (("learning_rate", "Learning rate"), ("grad_norm", "Norm of the gradient")):
        points = run.measured.get(name, ())
        if len({value for _, value in points}) > 1:
            yield Panel(name.replace("_", "-"), title, (Curve(title.lower(), thinned(points)),))


def _is_metric(key: str) -> bool:
    name = key.removeprefix(_EVAL)
    return not (
        name in _NO_METRICS
        or name.endswith(_NO_METRIC_ENDS)
        or name.startswith(("train_", "rank/"))
        or name.rpartition("/")[2] in _NO_METRICS
        or "/rank/" in name
    )
