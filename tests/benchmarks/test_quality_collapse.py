"""The grid that shows how far the default learning rate stands below collapse."""

from typing import Any

import pytest

# Imports after a statement: without the development extra this file is skipped, not broken.
for _module in ("peft", "transformers", "pyarrow"):
    pytest.importorskip(_module, reason="the benchmark needs the extra [dev]")
pytest.importorskip("tunerkit_adalora", reason="the benchmark needs the plugins")

from benchmarks.quality import collapse  # noqa: E402
from benchmarks.quality.runs import Run  # noqa: E402
from tunerkit_adalora import AdaLoraConfig  # noqa: E402


def row(run: Run, accuracy: float, majority: float | None = 0.5) -> dict[str, Any]:
    """A row of a run, as `execute` writes it; rows of earlier grids have no majority and no training."""
    found: dict[str, Any] = {
        "key": run.key,
        **{name: getattr(run, name) for name in ("task", "method", "rank", "learning_rate", "seed")},
        "settings": dict(run.settings),
        "validation": {"accuracy": accuracy},
    }
    return found if majority is None else {**found, "majority": majority, "training": dict(run.training)}


def test_a_run_is_collapsed_if_it_is_nearer_to_one_class_than_to_the_best() -> None:
    """The most frequent class has 50 %, and the best run 84 %: 67 % is the line between."""
    runs = [Run("movie-2", "lora", 8, 1e-3, seed) for seed in range(4)]
    rows = [row(run, accuracy) for run, accuracy in zip(runs, (0.84, 0.68, 0.66, 0.5), strict=True)]
    assert [collapse.is_collapsed(each, rows) for each in rows] == [False, False, True, True]
    with pytest.raises(ValueError, match="how frequent its most frequent class is"):
        collapse.is_collapsed(row(runs[0], 0.8, None), [row(runs[0], 0.8, None)])


def test_the_scale_that_was_measured_is_adaloras_default() -> None:
    """The command's values stand in its own tests, because the benchmarks do not depend on it."""
    assert collapse.AFTER.adalora == {"alpha": AdaLoraConfig(target_rank=collapse.RANK).resolved().alpha}
