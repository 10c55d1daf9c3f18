"""Metrics: which counts, which direction is better, and how far two are apart."""

import pytest

from plugins.cli.tests import run_records
from tunerkit_cli.report import scores
from tunerkit_cli.report.record import read


@pytest.mark.parametrize("name", ["loss", "perplexity", "mse", "rmse", "word_wer", "eval_loss"])
def test_losses_and_errors_are_better_low(name: str) -> None:
    """As their names say."""
    assert not scores.is_better_high(name)


@pytest.mark.parametrize("name", ["accuracy", "f1", "macro_f1", "r2", "pearson", "rouge", "closeness"])
def test_other_metrics_are_better_high(name: str) -> None:
    """Only whole words count: "closeness" is no loss."""
    assert scores.is_better_high(name)


def test_the_run_decides_for_its_main_metric() -> None:
    """A name cannot say everything."""
    run = read(run_records.minimal(metrics={"score": 1.0}, main_metric="score", greater_is_better=False))
    assert not scores.is_better_high("score", run)
    assert scores.is_better_high("accuracy", run)


@pytest.mark.parametrize(
    ("metrics", "wanted", "main"),
    [
        ({"loss": 1.0, "f1": 0.5}, "loss", "loss"),
        ({"loss": 1.0, "f1": 0.5}, None, "f1"),
        ({"loss": 1.0, "f1": 0.5}, "accuracy", "f1"),
        ({"loss": 1.0}, None, "loss"),
        ({}, "f1", None),
    ],
)
def test_the_main_metric_is_one_that_there_is(metrics: dict[str, float], wanted: str | None, main: str | None) -> None:
    """The wanted one, else the first that is no loss, else any."""
    assert scores.main_metric(metrics, wanted) == main


@pytest.mark.parametrize(
    ("name", "difference", "text"),
    [
        ("accuracy", 0.1527, "+15.3\xa0points"),
        ("accuracy", -0.01, "−1.0\xa0point"),
        ("loss", -0.12, "−0.120"),
        ("perplexity", 2.616, "+2.616"),
        ("f1", 0.0, "±0.0\xa0points"),
    ],
)
def test_shares_differ_by_points(name: str, difference: float, text: str) -> None:
    """Other metrics differ by their own unit."""
    assert scores.signed(name, difference) == text


@pytest.mark.parametrize(
    ("name", "title"), [("macro_f1", "macro F1"), ("mse", "MSE"), ("rewards/margins", "rewards/margins")]
)
def test_abbreviations_are_upper_case(name: str, title: str) -> None:
    """Words are separated by blanks."""
    assert scores.title(name) == title
