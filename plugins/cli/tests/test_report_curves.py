"""Curves: thinned without losing extremes, smoothed without moving, and left out where they say nothing."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given, strategies as st

from plugins.cli.tests import run_records
from tunerkit_cli.report import curves
from tunerkit_cli.report.record import read

series = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=1500)


def points(values: Sequence[float]) -> curves.Points:
    return tuple((float(step), value) for step, value in enumerate(values))


def panels(**parts: Any) -> dict[str, curves.Panel]:
    return {panel.name: panel for panel in curves.panels(read(run_records.minimal(**parts)))}


@given(series, st.integers(4, 500))
def test_a_thinned_curve_keeps_its_ends_and_extremes(values: list[float], limit: int) -> None:
    """No more points than allowed, all of them in their order; short curves stay whole."""
    whole = points(values)
    kept = curves.thinned(whole, limit)
    assert len(kept) <= max(limit, 1)
    assert [point for point in whole if point in set(kept)] == list(kept)
    assert (kept[0], kept[-1]) == (whole[0], whole[-1])
    assert min(y for _, y in kept) == min(values)
    assert max(y for _, y in kept) == max(values)
    if len(whole) <= limit:
        assert kept == whole


@given(series)
def test_a_smoothed_curve_is_a_mean_of_neighbours(values: list[float]) -> None:
    """Of those up to a twentieth of the curve before and after each point; at the ends, of the nearest quarter."""
    smooth = curves.smoothed(points(values))
    assert [step for step, _ in smooth] == [float(step) for step in range(len(values))]
    reach = max(1, len(values) // 20)
    if len(values) > 2 * reach:
        assert smooth[reach][1] == pytest.approx(fmean(values[: 2 * reach + 1]), abs=1e-3)
    assert smooth[0][1] == pytest.approx(fmean(values[: reach // 4 + 1]), abs=1e-3)
    assert smooth[-1][1] == pytest.approx(fmean(values[-(reach // 4 + 1) :]), abs=1e-3)


def test_loss_has_training_and_held_out_curves() -> None:
    """The last row of a step counts; a long training curve is also shown smoothed."""
    logs = [{"step": 1, "loss": 2.0}, {"step": 1, "loss": 1.5}, {"step": 2, "loss": 1.0, "eval_loss": 1.1}]
    short = panels(logs=logs)["loss"]
    assert [(curve.name, curve.points) for curve in short.curves] == [
        ("training", ((1.0, 1.5), (2.0, 1.0))),
        ("held-out", ((2.0, 1.1),)),
    ]
    long = panels(logs=[{"step": step, "loss": 1 / (step + 1)} for step in range(50)])["loss"]
    assert [curve.style for curve in long.curves] == ["faint", "line"]


def test_a_loss_over_decades_is_logarithmic() -> None:
    """Otherwise its end would be a flat line."""
    assert panels(logs=[{"step": step, "loss": 100.0 / 2**step} for step in range(9)])["loss"].is_log
    assert not panels(logs=[{"step": step, "loss": 1.0 - step / 20} for step in range(9)])["loss"].is_log


def test_each_metric_has_a_panel_with_the_baseline_in_it() -> None:
    """The main one comes first; times, counters, and what has one value have none."""
    logs = [
        {"step": s, "eval_f1": s / 9, "eval_accuracy": s / 8, "eval_runtime": 2.0, "num_tokens": s, "train_loss": 1.0}
        for s in (1, 2)
    ]
    logs.append({"step": 2, "eval_once": 0.5})
    baseline = {"what": "head alone", "metrics": {"accuracy": 0.7}}
    metrics = {"f1": 0.2, "accuracy": 0.25}
    found = panels(logs=logs, metrics=metrics, main_metric="accuracy", baseline=baseline)
    assert list(found) == ["metric-accuracy", "metric-f1"]
    assert [(c.name, c.style) for c in found["metric-accuracy"].curves] == [
        ("held-out", "dots"),
        ("head alone", "mark"),
    ]
    assert found["metric-accuracy"].curves[1].points == ((1.0, 0.7), (2.0, 0.7))
    assert len(found["metric-f1"].curves) == 1


def test_metrics_of_training_alone_have_panels_too() -> None:
    """Such as the rewards of preference training."""
    logs = [{"step": step, "rewards/margins": step / 10, "eval_rewards/margins": step / 11} for step in (1, 2)]
    assert [curve.name for curve in panels(logs=logs)["metric-rewards/margins"].curves] == ["training", "held-out"]


def test_what_never_changes_has_no_curve() -> None:
    """A constant learning rate, budget or rank."""
    logs = [{"step": step, "learning_rate": 1e-3, "budget": 8, "rank_mean": 4.0, "rank/a": 4} for step in (1, 2, 3)]
    history = [{"step": step, "budget": 8, "ranks": [4, 4]} for step in (0, 1)]
    assert panels(logs=logs, ranks={"a": 4, "b": 4}, history=history) == {}


def test_ranks_over_steps_are_summarised() -> None:
    """The greatest, the mean and the least of all targets; and the budget where it changes."""
    history = [{"step": 0, "budget": 8, "ranks": [4, 4]}, {"step": 9, "budget": 6, "ranks": [5, 1]}]
    found = panels(ranks={"a": 5, "b": 1}, history=history, budget={"unit": "parameters"})
    assert found["budget"].unit == "parameters"
    assert found["budget"].curves[0].points == ((0.0, 8), (9.0, 6))
    assert {curve.name: [y for _, y in curve.points] for curve in found["rank"].curves} == {
        "greatest": [4, 5],
        "mean": [4, 3],
        "least": [4, 1],
    }


def test_the_spectrum_is_sorted_and_its_median_covers_what_most_targets_have() -> None:
    """Zeros and rounding errors, which a logarithmic axis cannot show, are left out, and so are pruned targets."""
    spectra = {"a": [1.0, 4.0, 2.0, 0.0], "b": [3.0, 1.0, 1e-15], "c": [2.0], "pruned": []}
    run = read(run_records.minimal(spectrum=spectra))
    panel = curves.spectrum(run)
    assert panel is not None
    assert panel.curves[0].points == ((1.0, 4.0), (2.0, 2.0), (3.0, 1.0))
    assert panel.curves[-1].points == ((1.0, 3.0), (2.0, 1.5))
    assert curves.spectrum(read(run_records.minimal(spectrum={"a": [1.0, 0.0]}))) is None


def test_ten_thousand_rows_are_thinned() -> None:
    """No curve has more points than a page shows."""
    found = curves.panels(read(run_records.large()))
    assert max(len(curve.points) for panel in found for curve in panel.curves) == curves.MOST_POINTS
