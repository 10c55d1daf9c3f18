"""The grid that shows how far the default learning rate stands below collapse."""

from typing import Any

import pytest

# Imports after a statement: without the development extra this file is skipped, not broken.
for _module in ("peft", "transformers", "pyarrow"):
    pytest.importorskip(_module, reason="the benchmark needs the extra [dev]")
pytest.importorskip("tunerkit_adalora", reason="the benchmark needs the plugins")

from benchmarks.quality import collapse  # noqa: E402
from benchmarks.quality.__main__ import unmade  # noqa: E402
from benchmarks.quality.grids import COMPARED  # noqa: E402
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


def test_shares_are_counted_before_and_after_and_earlier_rows_count_as_before() -> None:
    """Each cell has the runs of its own method, rate, training and precision, one for each seed."""
    before = [row(Run("movie-2", "lora", 8, 2e-3, seed), 0.5, None) for seed in (0, 1)]
    after = [row(collapse.AFTER.run("movie-2", "lora", 2, seed), 0.84) for seed in (0, 1)]
    other = [row(collapse.AFTER.run("movie-2", "lora", 2, 0, "bf16"), 0.5)]
    lines = collapse.collapse_table([*before, *after, *other])
    assert "| movie-2 | fp32 | LoRA |  | 2/2 |  |  | 0/2 |  |" in lines
    assert "| movie-2 | bf16 | LoRA |  |  |  |  | 1/1 |  |" in lines


def test_what_the_change_costs_is_paired_by_seed() -> None:
    """Of seeds 0 and 1, and not of seed 2, which ran before alone."""
    before = [row(Run("movie-2", "lora", 8, 1e-3, seed), 0.80 + seed / 100) for seed in (0, 1, 2)]
    after = [row(collapse.AFTER.run("movie-2", "lora", 1, seed), 0.81 + seed / 100) for seed in (0, 1)]
    lines = collapse.default_table([*before, *after], ("movie-2",))
    assert lines[2] == "| movie-2 | +1.00 [+1.00, +1.00] |  |"


def test_rows_of_the_search_for_rates_are_not_run_again() -> None:
    """They are the runs of before, at the same rates and seeds."""
    runs = [run for run in collapse.collapse_runs() if not run.training]
    made = {"rates": [row(run, 0.8) for run in runs[:10]]}
    left = unmade("collapse", None, made)
    assert len(unmade("collapse", None, {})) - len(left) == 10
    assert not {run.key for run in runs[:10]} & {run.key for run in left}
    assert {run.task for run in collapse.default_runs(COMPARED)} == {*COMPARED}


def test_half_precision_runs_on_few_tasks_and_every_run_stands_once() -> None:
    """Six seeds in fp32 on five tasks; three in bf16 on two."""
    keys = [run.key for run in collapse.collapse_runs()]
    assert len({*keys}) == len(keys) == 2 * 3 * 2 * (5 * 6 + 2 * 3)


def test_the_scale_that_was_measured_is_adaloras_default() -> None:
    """The command's values stand in its own tests, because the benchmarks do not depend on it."""
    assert collapse.AFTER.adalora == {"alpha": AdaLoraConfig(target_rank=collapse.RANK).resolved().alpha}
