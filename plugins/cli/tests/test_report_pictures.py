"""Pictures of the panels: which there are, and what they show."""

from pathlib import Path

import numpy
import pytest

from plugins.cli.tests import run_records
from tunerkit_cli.report import curves
from tunerkit_cli.report.pictures import draw
from tunerkit_cli.report.record import RecordError, read


def test_each_panel_that_says_something_has_a_picture() -> None:
    """Under a name that a file can have; the others have none."""
    curves_of_training = ["loss", "metric-accuracy", "metric-f1", "learning-rate", "grad-norm"]
    expected = [*curves_of_training, "rank", "budget", "spectrum", "ranks", "parameters", "confusion"]
    assert list(draw(run_records.classifier(2))) == expected
    assert list(draw(run_records.regression())) == ["errors"]
    assert dict(draw(run_records.minimal())) == {}
    assert "budget" not in draw(run_records.language_model())


def test_pictures_are_written_as_png(tmp_path: Path) -> None:
    """All of them, also of a method without a budget."""
    for name, figure in draw(run_records.language_model()).items():
        figure.savefig(tmp_path / f"{name}.png", dpi=50)
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_has_the_curves_of_its_panel() -> None:
    """Point for point, and the same titles as the report."""
    record = run_records.classifier(2)
    panel = next(panel for panel in curves.panels(read(record)) if panel.name == "loss")
    axes = draw(record)["loss"].axes[0]
    drawn = [numpy.asarray(line.get_xydata()).tolist() for line in axes.lines]
    assert drawn == [[list(point) for point in curve.points] for curve in panel.curves]
    assert axes.get_title() == "Loss"
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["training, smoothed", "held-out"]


def test_the_confusion_matrix_has_counts_and_shares() -> None:
    """Each cell's colour is its share of the row."""
    axes = draw(run_records.minimal(labels=["a", "b"], confusion=[[3, 1], [0, 0]]))["confusion"].axes[0]
    assert [text.get_text() for text in axes.texts] == ["3", "1", "0", "0"]
    shares = axes.images[0].get_array()
    assert shares is not None
    assert shares.tolist() == [[0.75, 0.25], [0.0, 0.0]]


def test_a_history_without_budget_has_no_picture_of_one() -> None:
    """The ranks have theirs."""
    history = [{"step": 0, "ranks": [2, 2]}, {"step": 1, "ranks": [1, 3]}]
    assert list(draw(run_records.minimal(ranks={"a.0.q": 1, "a.1.q": 3}, history=history))) == ["rank", "ranks"]


def test_a_damaged_record_is_refused() -> None:
    """As by the report."""
    with pytest.raises(RecordError):
        draw({"version": 3})
