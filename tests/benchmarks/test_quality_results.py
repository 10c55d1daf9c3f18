"""The quality benchmark's use of its rows: learning rates, dependent grids, tables and plots."""

from collections import Counter
from pathlib import Path

import attrs
import numpy as np
import pytest

from tests.support.quality_needs import skip_without_what_quality_needs

skip_without_what_quality_needs()

from typer.testing import CliRunner  # noqa: E402

from benchmarks.quality import (  # noqa: E402
    __main__ as command,
    ablation,
    grids,
    rates,
    scores,
    store,
    tables,
)
from benchmarks.quality.runs import Run  # noqa: E402
from tunerkit_cli.sweeping.statistics import interval_of_mean  # noqa: E402


def row_of(run: Run, accuracy: float, loss: float | None = 1.0) -> store.Row:
    """The row of a run with that accuracy."""
    return {"key": run.key, **attrs.asdict(run), "validation": {"accuracy": accuracy, "loss": loss}}


def searched(asked: Run, peak: float, *, by_all_seeds: bool = False) -> list[store.Row]:
    """All rows of the search for a method's learning rate, with the highest accuracy at ``peak``."""
    found: list[store.Row] = []
    while rates.rate_of(asked, found, by_all_seeds=by_all_seeds) is None:
        wanted = rates.next_runs(asked, found, by_all_seeds=by_all_seeds)
        found += [row_of(run, 1 - abs(np.log(run.learning_rate / peak)) / 10) for run in wanted]
    return found


def test_neighbours_of_the_first_seeds_best_are_decided_by_all_seeds() -> None:
    """The mean of three seeds decides between three rates. If the best is at an edge, the next rate is tried."""
    asked = Run("movie-2", "lora", 8, 0.0, 0)
    found = [row for row in searched(asked, peak=1e-3) if row["seed"] == 0]
    accuracies = {2.5e-4: 0.7, 5e-4: 0.95, 1e-3: 0.8, 2e-3: 0.75}
    tried: list[tuple[float, ...]] = []
    while rates.rate_of(asked, found, by_all_seeds=True) is None:
        done = {(row["learning_rate"], row["seed"]) for row in found}
        wanted = rates.next_runs(asked, found, by_all_seeds=True)
        assert {run.seed for run in wanted} == {*rates.SEEDS}
        tried.append(tuple(sorted({run.learning_rate for run in wanted})))
        fresh = [run for run in wanted if (run.learning_rate, run.seed) not in done]
        found += [row_of(run, accuracies[run.learning_rate]) for run in fresh]
    assert tried == [(5e-4, 1e-3, 2e-3), (2.5e-4, 5e-4, 1e-3, 2e-3)]
    assert rates.rate_of(asked, found, by_all_seeds=True) == 5e-4
    assert rates.rate_of(asked, found) == 1e-3  # the first seed's alone


# The ablation


def test_a_change_is_shown_as_points_over_lora() -> None:
    """Differences are by seed, the best first, with the loss. A change that is missing on one task is left out."""
    both = ("movie-2", "nyt-3")
    lora = [row_of(Run(task, "lora", 1, 1e-3, seed), 0.5 + seed / 10) for task in both for seed in (0, 1)]
    better, worse, half = list(ablation.CHANGES)[:3]

    def made(change: str, tasks: tuple[str, ...], gain: float) -> list[store.Row]:
        settings = ablation.settings_of(change)
        return [
            row_of(Run(task, "adalora", 1, 1e-3, seed, settings), 0.5 + seed / 10 + gain, 1 - gain)
            for task in tasks
            for seed in (0, 1)
        ]

    changed = [*made(worse, both, -0.02), *made(better, both, 0.01), *made(half, both[:1], 1)]
    table = ablation.ablation_table([*lora, *changed])
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| {better}", f"| {worse}"]
    assert table[2].endswith("| +1.00 (2) | +1.00 (2) | +1.00 | -1.0 |")
    elsewhere = [{**row, "learning_rate": 2e-3} for row in lora] + [{**row, "rank": 8} for row in lora]
    assert ablation.ablation_table([*elsewhere, *changed]) == table[:2]


# The contest


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[store.Row]]:
    """Two tasks, one with headroom, and the rows that find LoRA's and AdaLoRA's learning rates on them."""
    monkeypatch.setattr(grids, "COMPARED", ("movie-2", "nyt-3"))
    monkeypatch.setattr(grids, "HEADROOM", ("movie-2",))
    peaks = {("lora", 1): 2e-3, ("lora", 8): 1e-3, ("adalora", 1): 4e-3, ("adalora", 8): 1e-3}
    made: dict[str, list[store.Row]] = {"headroom": [], "rates": []}
    for (method, rank), peak in peaks.items():
        for task in grids.COMPARED:
            made["rates"] += searched(Run(task, method, rank, 0.0, 0), peak, by_all_seeds=True)
    # Other rates than those of the contest: LoRA's curve is drawn from these, and nothing else is.
    made["headroom"] = [row for rank in (1, 2, 8) for row in searched(Run("movie-2", "lora", rank, 0.0, 0), 5e-4)]
    return made


def test_the_contest_takes_each_method_at_its_best_rate_and_at_the_others_too(
    compared: dict[str, list[store.Row]],
) -> None:
    """On test rows, if rates are known; the lowest rank only on tasks with headroom; with no seed used for a choice."""
    found = grids.contest_runs(compared)
    assert len({run.key for run in found}) == len(found)
    assert all(run.tested for run in found)
    counted = Counter((run.task, run.method, run.rank, run.learning_rate) for run in found)
    assert {run.seed for run in found if run.rank == 1}.isdisjoint(run.seed for run in found if run.rank == 8)
    eights = {(task, method, 8, 1e-3): 5 for task in ("movie-2", "nyt-3") for method in ("lora", "adalora")}
    ones = {("movie-2", method, 1, rate): 10 for method in ("lora", "adalora") for rate in (2e-3, 4e-3)}
    assert counted == {**eights, **ones}
    assert not {run.seed for run in found} & {*rates.SEEDS, *ablation.SEEDS}


@pytest.mark.parametrize(("peak", "tried"), [(2e-3, 3), (4e-3, 4), (1.6e-2, 6), (2.5e-4, 6)])
def test_rates_are_tried_until_the_best_lies_between_others(peak: float, tried: int) -> None:
    """After the first three, rates are doubled or halved; then further seeds run at the best rate only."""
    asked = Run("movie-2", "lora", 1, 0.0, 0)
    found: list[store.Row] = []
    while (runs := rates.next_runs(asked, found))[0].seed == 0:
        found += [row_of(run, 1 - abs(np.log(run.learning_rate / peak)) / 10) for run in runs]
    assert len(found) == tried
    assert [run.learning_rate for run in runs] == pytest.approx([peak, peak])
    assert [run.seed for run in runs] == [1, 2]


# Tables


def rows(task: str, rank: int, rate: float, accuracies: list[float]) -> list[store.Row]:
    return [
        {"task": task, "rank": rank, "learning_rate": rate, "seed": seed, "validation": {"accuracy": accuracy}}
        for seed, accuracy in enumerate(accuracies)
    ]


def test_the_best_rate_is_chosen_by_mean_validation_accuracy() -> None:
    """Only rates with the most seeds count: one lucky run is not enough."""
    cell = scores.best(rows("a", 1, 1e-3, [0.5, 0.6]) + rows("a", 1, 2e-3, [0.7, 0.6]) + rows("a", 1, 4e-3, [0.9]))
    assert (cell.rate, cell.seeds) == (2e-3, (0, 1))
    assert cell.mean == pytest.approx(65)
    assert cell.error == pytest.approx(np.std([70, 60], ddof=1) / 2**0.5)


def test_an_interval_is_over_tasks_and_of_one_task_over_seeds() -> None:
    """The mean weighs tasks equally; the interval is Student's t, and two values have none."""
    seeds, other = np.array([0.0, 2.0, 0.0, 2.0]), np.array([3.0, 3.0])
    assert scores.interval([seeds]) == pytest.approx((1 - 3.182 / 3**0.5, 1 + 3.182 / 3**0.5), abs=1e-3)
    assert scores.interval([seeds, other, other + 2]) == pytest.approx(
        (3 - 4.303 * 2 / 3**0.5, 3 + 4.303 * 2 / 3**0.5), abs=1e-3
    )
    assert scores.told([seeds, other]) == "+2.00"
    assert scores.told([other]) == "+3.00"
    assert scores.told([np.array([1.0, 1.0, 1.0])]) == "+1.00 [+1.00, +1.00]"
    assert scores.told([seeds, np.array([])]) == ""


def test_an_interval_of_few_values_holds_its_level() -> None:
    """Of 4,000 means of three normal values 95 % lie in their interval, within 1.5 points (four standard errors)."""
    drawn = np.random.default_rng(0).normal(size=(4000, 3))
    held = np.mean([low <= 0 <= high for low, high in map(interval_of_mean, drawn)])
    assert held == pytest.approx(0.95, abs=0.015)


def test_all_tables_of_the_stored_rows_are_made() -> None:
    """The rows of all grids are counted, and the page of the record has the tables' means as they are printed."""
    result = CliRunner().invoke(command.app, ["tables"])
    assert result.exit_code == 0, result.output
    counted = [line for line in result.output.splitlines() if line.endswith("hours of one core")]
    assert len(counted) == len(list(command.ROWS.glob("*.jsonl")))
    page = (command.ROWS.parents[2] / "docs/evidence/quality-record.md").read_text(encoding="utf-8").replace("**", "")
    for rank in (1, 8):
        lines = tables.compared_table(store.read_all(command.ROWS), rank)
        means = next(line for line in lines if line.startswith("| mean of tasks")).split("|")
        assert all(f"| {cell.strip()} |" in page for cell in means[4:7])


def test_tables_of_nothing_are_their_heads(tmp_path: Path) -> None:
    """Without rows, tables are printed with their header only."""
    result = CliRunner().invoke(command.app, ["tables", "--rows", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "| task | r = 1 |" in result.output


def test_headroom_is_a_point_between_rank_one_and_eight() -> None:
    """Differences are by seed, so a shift that all seeds share does not add to the spread."""
    steep = rows("steep", 1, 1e-3, [0.5, 0.7, 0.6]) + rows("steep", 8, 1e-3, [0.52, 0.72, 0.62])
    flat = rows("flat", 1, 1e-3, [0.5, 0.7, 0.6]) + rows("flat", 8, 1e-3, [0.505, 0.705, 0.605])
    once = rows("once", 1, 1e-3, [0.5]) + rows("once", 8, 1e-3, [0.6])
    table = tables.headroom_table([*steep, *flat, *rows("begun", 1, 1e-3, [0.5, 0.6]), *once])
    assert [line.split(" | ")[0] for line in table[2:]] == ["| steep", "| flat", "| begun", "| once"]
    assert "+2.00 [+2.00, +2.00] | yes" in table[2]
    assert "+0.50 [+0.50, +0.50] | no" in table[3]
    assert "yes" not in table[4]
    assert table[5].endswith("| 60.00 (0.001, 1) |  | +10.00 | open |")
