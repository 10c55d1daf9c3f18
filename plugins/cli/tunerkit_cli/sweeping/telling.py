"""What a sweep ends with: a table of its settings, and one sentence on which to take."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import attrs
import rich.table

from tunerkit.paths import few
from tunerkit_cli.report import wording
from tunerkit_cli.report.curves import Curve, Panel
from tunerkit_cli.report.html.page import drawn, filled
from tunerkit_cli.report.html.tables import Table
from tunerkit_cli.sweeping.grid import Arm
from tunerkit_cli.sweeping.statistics import Difference, Outcome, Scores, outcome, rows_to_tell, seeds_to_tell

_POINTS: Final = 100  # in 1
_LINEAR: Final = 5  # axes that span a greater factor are logarithmic


@attrs.frozen(eq=False)
class Result:
    """What is known of one setting.

    Attributes:
        choosing: The scores (seeds, rows) on the rows by which a setting is chosen.
        judging: The scores (seeds, rows) on the others, which judge the choice.
        parameters: How many parameters are trained.
        seconds: How long a training took on average.
        rate: The learning rate, if the recipe says it.
        setting: The values that were chosen for it, in a comparison of methods.
    """

    choosing: Scores
    judging: Scores
    parameters: int
    seconds: float
    rate: float | None = None
    setting: str = ""


def sentence(results: Mapping[str, Result], metric: str) -> str:
    """Say which setting to take, what cannot be told from it, and how many more seeds or rows would tell.

    Args:
        results: Of each setting by its name, with the same number of seeds; at least two.
        metric: The name of the score.
    """
    found = chosen(results)
    seeds, rows = results[found.best].judging.shape
    told = [name for name in found.differences if name not in found.level_with]
    own, reached = results[found.best].setting, value(results[found.best].judging, metric)
    best = f"take {found.best}{f' with {own}' if own else ''}: {metric} {reached} on {rows} rows"
    if seeds == 1:
        return f"{best}, the best of {len(results)} on other rows. With one seed no difference can be told: --seeds 3"
    parts = []
    better = [name for name in told if found.differences[name].mean > 0]
    if better:
        parts.append(f"better than {few(better, shown=5)}, by {_range(found, better, metric)}")
    if worse := [name for name in told if name not in better]:
        parts.append(
            f"but {few(worse, shown=5)} did better on these rows, by {_range(found, worse, metric)}: the {rows} others "
            "are too few to choose by"
        )
    if level := found.level_with:
        behind = [name for name in level if found.differences[name].mean > 0]
        more = "; ".join(_needed(name, found.differences[name], metric) for name in behind[:3])
        parts.append(f"not to be told from {few(level, shown=5)} with {seeds} seeds{f' ({more})' if more else ''}")
    return f"{best}, {', and '.join(parts)}"


def chosen(results: Mapping[str, Result]) -> Outcome:
    """Choose the setting that is best on the rows for choosing, and compare it with the others on the other rows."""
    best = max(results, key=lambda name: (round(float(results[name].choosing.mean()), 9), -results[name].parameters))
    return outcome(best, {name: each.judging for name, each in results.items()})


def table(results: Mapping[str, Result], metric: str) -> Table:
    """Return the table of what is compared, the best first, with the difference of each from the one to take."""
    found = chosen(results)
    columns = ("setting", metric, "the best minus this one", "trained parameters", "training, s")
    order = sorted(results, key=lambda name: (name != found.best, -float(results[name].judging.mean())))
    rows = []
    for name in order:
        each, gap = results[name], found.differences.get(name)
        said = "best" if gap is None else _interval(gap, metric)
        full = f"{name}, {each.setting}" if each.setting else name
        rows.append((full, value(each.judging, metric), said, f"{each.parameters:,}", f"{each.seconds:.1f}"))
    return Table(columns, tuple(rows), best=frozenset({(0, 1)}))


def values(results: Mapping[str, Result], metric: str) -> list[dict[str, Any]]:
    """Return the table as numbers; of a loss, less is better, and a difference is in the unit of the score."""
    found, sign = chosen(results), 1 if metric == "accuracy" else -1
    rows = []
    for name, each in results.items():
        gap = found.differences.get(name)
        told = None if gap is None else {"mean": gap.mean, "low": gap.low, "high": gap.high, "is_told": gap.is_told}
        if told is not None and each.judging.shape[0] == 1:
            told = {"mean": told["mean"]}
        seeds, count = each.judging.shape
        own = {"name": name, "setting": each.setting, metric: sign * float(each.judging.mean()), "seeds": seeds}
        own |= {"rows": count, "best_minus_this": told, "parameters": each.parameters, "seconds": each.seconds}
        rows.append(own)
    return rows


def printed(data: Table) -> rich.table.Table:
    """Return a table for a terminal."""
    made = rich.table.Table(*data.columns)
    for row in data.rows:
        made.add_row(*row)
    return made


def panels(results: Mapping[str, Result], arms: Mapping[str, Sequence[Arm]], metric: str) -> list[list[Panel]]:
    """Return the charts of a report, those with one x-axis together: the score over rate, size and cost.

    Args:
        results: Of each setting that ran, with as many seeds as it ran.
        arms: The settings of each contender.
        metric: The name of the score.
    """
    return [
        _panel("learning rate", metric, _points(results, arms, metric, lambda each: each.rate, by_seed=False)),
        _panel("trained parameters", metric, _points(results, arms, metric, lambda each: float(each.parameters))),
        _panel("seconds of a training", metric, _points(results, arms, metric, lambda each: each.seconds)),
    ]


def _points(
    results: Mapping[str, Result],
    arms: Mapping[str, Sequence[Arm]],
    metric: str,
    x_of: Callable[[Result], float | None],
    *,
    by_seed: bool = True,
) -> tuple[Curve, ...]:
    """Return the points of each contender: a dot for each seed, or a line of means on the rows for choosing."""
    scale, curves = _POINTS if metric == "accuracy" else -1, []
    for name, own in arms.items():
        found = [results[arm.name] for arm in own if arm.name in results]
        points = {
            (x, scale * float(scores.mean()))
            for each in found
            if (x := x_of(each)) is not None
            for scores in (each.judging if by_seed else [each.choosing])
        }
        if points:
            curves.append(Curve(name, tuple(sorted(points)), "dots" if by_seed else "line"))
    return tuple(curves)


def _panel(x_title: str, metric: str, curves: tuple[Curve, ...]) -> list[Panel]:
    """Return a chart, if there is more than one place on its x-axis."""
    places = {x for curve in curves for x, _ in curve.points}
    if len(places) < 2:
        return []
    is_log = min(places) > 0 and max(places) > _LINEAR * min(places)
    title = f"{wording.capitalised(metric)}{' in %' if metric == 'accuracy' else ''} over the {x_title}"
    return [Panel(x_title, title, curves, x_title=x_title, x_is_log=is_log)]


def page(title: str, said: str, noted: Sequence[str], data: Table, groups: Sequence[Sequence[Panel]]) -> str:
    """Return the report of a sweep as one HTML file: its sentence, its notes, its table, and its charts."""
    values = {"title": title, "sentence": wording.capitalised(said), "notes": [*map(wording.capitalised, noted)]}
    charts = [each for group in groups if group for each in drawn(group)]
    return filled("sweep.html.j2", {**values, "table": data, "charts": charts})


def notes(results: Mapping[str, Result], rates: Mapping[str, Sequence[float]]) -> list[str]:
    """Say what else is worth knowing: settings that change nothing, and best rates at the end of those tried.

    Args:
        results: Of what is compared, by name.
        rates: The learning rates that were tried of what is the best of its rates, by name.
    """
    found = [
        f"{few(same, shown=5)} gave the same answers to all rows: what differs changes nothing here"
        for same in unchanged(results)
    ]
    for side, end in (("smallest", min), ("largest", max)):
        names = [name for name in rates if len(rates[name]) > 1 and results[name].rate == end(rates[name])]
        if names:
            found.append(f"the best rate of {few(names, shown=5)} is the {side} that was tried; try further ones")
    return found


def unchanged(results: Mapping[str, Result]) -> list[list[str]]:
    """Return the groups of settings whose runs ended with the same scores of all rows."""
    groups: dict[bytes, list[str]] = {}
    for name, each in results.items():
        groups.setdefault(each.choosing.tobytes() + each.judging.tobytes(), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def value(scores: Scores, metric: str) -> str:
    """Write the mean score, as accuracy in percent or as a loss."""
    mean = float(scores.mean())
    return f"{_POINTS * mean:.1f} %" if metric == "accuracy" else f"{-mean:.4f}"


def _amount(value: float, metric: str) -> str:
    return f"{_POINTS * value:+.1f} points" if metric == "accuracy" else f"{value:+.4f}"


def _ends(gap: Difference, metric: str) -> tuple[float, float]:
    """The ends of an interval; no difference of shares is above 1."""
    return (max(-1.0, gap.low), min(1.0, gap.high)) if metric == "accuracy" else (gap.low, gap.high)


def _range(found: Outcome, names: Sequence[str], metric: str) -> str:
    """The least and the greatest end of the intervals of differences that were told."""
    ends = [abs(each) for name in names for each in _ends(found.differences[name], metric)]
    return f"{_amount(min(ends), metric)} to {_amount(max(ends), metric)}"


def _interval(gap: Difference, metric: str) -> str:
    if gap.seeds == 1:
        return _amount(gap.mean, metric)
    low, high = _ends(gap, metric)
    return f"{_amount(gap.mean, metric)} [{_amount(low, metric)}, {_amount(high, metric)}]"


def _needed(name: str, gap: Difference, metric: str) -> str:
    said = f"{name}: {_interval(gap, metric)}"
    seeds, rows = seeds_to_tell(gap), rows_to_tell(gap)
    if seeds is not None:
        return f"{said}, which {seeds} seeds would tell"
    return (
        f"{said}, which {2 * rows} held-out rows would tell"
        if rows is not None
        else f"{said}, which needs more seeds and rows"
    )
