"""The quality benchmark's use of its rows: learning rates, dependent grids, tables and plots."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest

from tests.support.quality_needs import skip_without_what_quality_needs

skip_without_what_quality_needs()

from matplotlib.container import ErrorbarContainer  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from benchmarks.quality import (  # noqa: E402
    __main__ as command,
    ablation,
    contest,
    grids,
    plots,
    rates,
    scores,
    store,
    tables,
)
from benchmarks.quality.runs import Run  # noqa: E402
from tests.support.quality_rows import row_of, searched  # noqa: E402


def test_ranks_between_the_ends_take_the_rates_from_one_to_the_other() -> None:
    """Ranks beyond the last one take the lower rate and half of it."""
    for rank, expected in ((2, [1e-3, 2e-3, 4e-3]), (16, [5e-4, 1e-3])):
        found = grids.between(Run("movie-2", "lora", rank, 0.0, 0), [4e-3, 1e-3])
        assert [run.learning_rate for run in found] == pytest.approx(expected)
        assert {(run.rank, run.seed) for run in found} == {(rank, 0)}


def test_a_rate_is_known_when_all_its_seeds_are_made() -> None:
    """While some are missing, it is unknown."""
    asked = Run("movie-2", "lora", 1, 0.0, 0)
    found = searched(asked, peak=4e-3)
    assert rates.rate_of(asked, found) == 4e-3
    assert rates.rate_of(asked, found[:-1]) is None
    assert rates.rate_of(asked, []) is None


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


@pytest.mark.parametrize("grid", ["ablation", "rates", "contest"])
def test_a_grid_whose_tasks_are_not_fixed_says_so(grid: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not look as if all runs were done."""
    for name in ("ABLATED", "COMPARED"):
        monkeypatch.setattr(grids, name, ())
    result = CliRunner().invoke(command.app, ["run", "--grid", grid, "--rows", str(tmp_path)])
    assert result.exit_code == 2
    assert "not fixed yet" in result.output


def test_changes_differ() -> None:
    """No two labels stand for the same runs."""
    found = [json.dumps(ablation.settings_of(change), sort_keys=True) for change in ablation.CHANGES]
    assert len({*found}) == len(found)


def test_an_ablation_runs_at_the_best_rate_of_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA's rate at the ablation's rank is used, and LoRA itself runs too. An unknown rate is an error."""
    monkeypatch.setattr(grids, "ABLATED", ("movie-2",))
    asked = Run("movie-2", "lora", ablation.RANK, 0.0, 0)
    made = searched(asked, peak=2e-3, by_all_seeds=True)
    with pytest.raises(ValueError, match="run the grid rates first"):
        grids.ablation_runs({"rates": made[:-1]})
    elsewhere = searched(attrs.evolve(asked, rank=8), peak=1e-3, by_all_seeds=True)
    found = grids.ablation_runs({"rates": made + elsewhere, "headroom": searched(asked, peak=4e-3)})
    assert {run.learning_rate for run in found} == {2e-3}
    assert {run.method for run in found} == {"lora", "adalora"}
    assert len(found) == len({run.key for run in found}) == 2 + len(ablation.CHANGES) + len(ablation.AGAIN)
    assert Counter(run.seed for run in found)[1] == 1 + len(ablation.AGAIN)


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
    assert table[2].endswith("| +1.00 (2) | +1.00 (2) | +1.00 [+1.00, +1.00] | -1.0 [-1.0, -1.0] |")
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


def test_the_grid_of_rates_has_every_method_of_the_contest(compared: dict[str, list[store.Row]]) -> None:
    """LoRA is included whatever its headroom showed; PEFT's AdaLoRA is not run on image tasks."""
    found = {(run.task, run.method, run.rank) for run in grids.rates({"headroom": compared["headroom"]})}
    assert {(method, rank) for task, method, rank in found if task == "nyt-3"} == {("lora", 8), ("adalora", 8)}
    assert {(method, rank) for task, method, rank in found if task == "movie-2"} == {
        ("lora", 8),
        ("adalora", 8),
        ("head", 0),
        ("full", 0),
        ("lora", 1),
        ("adalora", 1),
        ("peft-adalora", 1),
    }
    later = {(entry.method, entry.rank) for entry in contest.entries("amazon-3", has_headroom=False, later=True)}
    assert later == {(method, rank) for method in ("lora", "adalora") for rank in (1, 8)}
    on_pictures = {entry.method for entry in contest.entries("fashion-10", has_headroom=True)}
    assert on_pictures == {"lora", "adalora", "head", "full"}


def test_the_contest_is_shown_by_task_and_over_all(
    compared: dict[str, list[store.Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Differences by seed at each method's best rate, at LoRA's rate, and PEFT's; missing cells stay empty."""
    gains = {("adalora", 4e-3): 0.02, ("adalora", 2e-3): 0.01, ("lora", 2e-3): 0.0, ("peft-adalora", 2e-3): -0.1}
    made = [
        {
            **row_of(Run("movie-2", method, 1, rate, seed, tested=True), 0.5),
            "test": {"accuracy": 0.6 + seed / 99 + gain, "loss": 2 - 10 * gain},
            "training_loss": 1 + gain,
        }
        for (method, rate), gain in gains.items()
        for seed in (10, 11)
    ]
    table = tables.compared_table({**compared, "contest": made}, rank=1)
    cells = [cell.strip() for cell in table[2].strip("|").split("|")]
    assert cells[0] == "movie-2"
    assert "(0.002, 2)" in cells[1]
    assert "(0.004, 2)" in cells[2]
    differences = ["+2.00 [+2.00, +2.00]", "+1.00 [+1.00, +1.00]", "", "-10.00 [-10.00, -10.00]"]
    assert cells[3:] == differences
    assert [cell.strip() for cell in table[3].strip("|").split("|")][3:] == differences
    assert len(tables.compared_table({**compared, "contest": made}, rank=8)) == 3
    validated = tables.compared_table(compared, rank=1, part="validation")
    assert validated[2].endswith("| +0.00 [+0.00, +0.00] | -6.93 [-6.93, -6.93] | +6.93 [+6.93, +6.93] |  |")
    elsewhere = [
        row
        for method, peak in (("lora", 2e-3), ("adalora", 4e-3))
        for row in searched(Run("nyt-3", method, 1, 0.0, 0), peak, by_all_seeds=True)
    ]
    more = {**compared, "rates": [*compared["rates"], *elsewhere]}
    fewer = [{**row, "task": "nyt-3"} for row in made if (row["method"], row["learning_rate"]) != ("adalora", 2e-3)]
    means = tables.compared_table({**more, "contest": [*made, *fewer]}, rank=1)[-1]
    assert "| +2.00 [+2.00, +2.00] | +1.00 [+1.00, +1.00] (1 of 2 tasks) |" in means
    monkeypatch.setattr(tables, "LATER", ("nyt-3",))
    two_means = tables.compared_table({**more, "contest": [*made, *fewer]}, rank=1)[-2:]
    assert [line.split(" | ")[:5] for line in two_means] == [
        ["| mean of tasks", "", "", "+2.00 [+2.00, +2.00]", "+1.00 [+1.00, +1.00]"],
        ["| with those that came later", "", "", "+2.00 [+2.00, +2.00]", "+1.00 [+1.00, +1.00] (1 of 2 tasks)"],
    ]
    assert len(tables.compared_table({**more, "contest": [*made, *fewer]}, rank=8)) == 3
    beside = tables.beside_table({**compared, "contest": made}, rank=1)
    assert beside[2:] == ["| movie-2 | +2.00 | +0.00 | -10.0 | +0.0 | +2.0 |"]
    assert len(tables.beside_table({**compared, "contest": made}, rank=8)) == 2
    apart = [row for row in made if (row["method"] == "lora") == (row["seed"] == 10)]
    assert tables.compared_table({**compared, "contest": apart}, rank=1)[2].endswith("|  |  |  |  |")
    assert len(tables.reference_table({**compared, "contest": made})) == 3


def test_other_methods_are_compared_with_lora_of_rank_1(compared: dict[str, list[store.Row]]) -> None:
    """Only common seeds count; each method is a point above the one before; a task without rows has no line."""
    peaks = {("head", 0): 2e-2, ("full", 0): 8e-5, ("peft-adalora", 1): 4e-3}
    known = [
        row
        for (method, rank), peak in peaks.items()
        for task in ("movie-2", "nyt-3")
        for row in searched(Run(task, method, rank, 0.0, 0), peak, by_all_seeds=True)
    ]
    made = [
        {
            **row_of(Run(task, method, rank, rate, seed, tested=True), 0.5),
            "test": {"accuracy": accuracy + seed / 100, "loss": 1.0},
        }
        for task, method, rank, rate, accuracy, seeds in (
            ("movie-2", "lora", 1, 2e-3, 0.6, (1, 2, 3)),
            ("movie-2", "lora", 8, 1e-3, 0.9, (1, 2, 3)),
            ("movie-2", "head", 0, 2e-2, 0.4, (1, 2)),
            ("movie-2", "full", 0, 8e-5, 0.7, (2, 3)),
            ("movie-2", "peft-adalora", 1, 4e-3, 0.5, (3,)),
            ("nyt-3", "lora", 8, 1e-3, 0.6, (1, 2)),
            ("nyt-3", "head", 0, 2e-2, 0.3, (1, 2)),
            ("tweets-3", "lora", 8, 1e-3, 0.6, (1, 2)),
        )
        for seed in seeds
    ]
    table = tables.reference_table({**compared, "rates": [*compared["rates"], *known], "contest": made})
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    names = ["head alone", "all weights", "PEFT's AdaLoRA"]
    assert lines[0][1:] == [*names, *(f"{name} − LoRA" for name in names)]
    cells = ["41.50 ± 0.50 (0.02, 2)", "72.50 ± 0.50 (8e-05, 2)", "53.00 (0.004, 1)"]
    over = ["-20.00 [-20.00, -20.00]", "+10.00 [+10.00, +10.00]"]
    assert lines[2:] == [
        ["movie-2", *cells, *over, "-10.00"],
        ["nyt-3", "31.50 ± 0.50 (0.02, 2)", *[""] * 5],
        ["mean of tasks", *[""] * 3, *(f"{each} (1 of 2 tasks)" for each in (*over, "-10.00"))],
    ]


def test_the_language_model_is_shown_by_rate_and_method() -> None:
    """Both methods at both rates, LoRA first; a diverged run has no loss, and neither has the mean."""
    made: list[store.Row] = []
    for run in grids.generation({}):
        gain = 0.02 if run.method == "adalora" else 0.0
        loss = None if run.learning_rate == 4e-3 and run.method == "peft-adalora" else 2.0 + run.seed - contest.SEEDS[1]
        made.append(
            {**row_of(run, 0.5), "test": {"accuracy": 0.4 + gain + (run.seed - contest.SEEDS[1]) / 1000, "loss": loss}}
        )
    assert len(made) == 18
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables.generation_table(made)[2:]]
    assert [line[:2] for line in table] == [
        [rate, name] for rate in ("0.001", "0.004") for name in ("LoRA", "AdaLoRA", "PEFT's AdaLoRA")
    ]
    assert table[0][2:] == ["40.00 ± 0.06 (3)", "2.0000", ""]
    assert table[1][2:] == ["42.00 ± 0.06 (3)", "2.0000", "+2.00 [+2.00, +2.00]"]
    assert table[5][3:] == ["", "+0.00 [+0.00, +0.00]"]
    assert len(tables.generation_table(made[:1])) == 3
    begun = [made[0], next(row for row in made if row["method"] == "adalora" and row["seed"] != made[0]["seed"])]
    assert [line.split("|")[-2].strip() for line in tables.generation_table(begun)[2:]] == ["", ""]


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


def test_of_two_rates_that_are_as_good_the_lower_is_chosen() -> None:
    """The order of the runs and rounding of the means do not matter."""
    higher, lower = [0.889, 0.893, 0.896], [0.8915, 0.8935, 0.893]
    assert scores.best(rows("a", 0, 1e-2, higher) + rows("a", 0, 5e-3, lower)).rate == 5e-3


def test_an_interval_draws_tasks_and_seeds() -> None:
    """The mean weighs tasks equally; tasks that differ widen the interval, and a single number has no width."""
    steady, other = np.array([1.0, 1.0, 1.0, 1.0]), np.array([3.0, 3.0])
    assert scores.interval([steady]) == (1, 1, 1)
    assert scores.interval([steady, other]) == (2, 1, 3)
    mean, low, high = scores.interval([np.array([0.0, 2.0, 0.0, 2.0])])
    assert mean == 1
    assert 0 <= low < 0.5
    assert 1.5 < high <= 2


def test_tables_of_nothing_are_their_heads(tmp_path: Path) -> None:
    """Without rows, tables are printed with their header only."""
    result = CliRunner().invoke(command.app, ["tables", "--rows", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "| task | r = 1 |" in result.output


def test_each_seed_of_the_ablation_has_its_own_table(tmp_path: Path) -> None:
    """LoRA's luck with a seed affects every change, so changes are ranked only within one seed."""
    gains = {(0, "nothing"): 0.01, (1, "nothing"): 0.02, (0, "t_final 0.5"): 0.03}
    lora = [Run("nyt-3", "lora", 1, 1e-3, seed) for seed in ablation.SEEDS]
    made = [row_of(run, 0.5) for run in lora]
    for (seed, change), gain in gains.items():
        run = attrs.evolve(lora[seed], method="adalora", settings=ablation.settings_of(change))
        made.append(row_of(run, 0.5 + gain))
    for row in made:
        store.append(tmp_path / "ablation.jsonl", row)
    shown = CliRunner().invoke(command.app, ["tables", "--rows", str(tmp_path)]).output
    first, second = shown.split("ablation, seed 1")
    assert "| t_final 0.5 | +3.00 (1) | +3.00 |" in first
    assert "| nothing | +1.00 (1) | +1.00 |" in first
    assert "| nothing | +2.00 (1) | +2.00 |" in second
    assert "t_final 0.5" not in second


def test_headroom_is_a_point_between_rank_one_and_eight() -> None:
    """Differences are by seed, so a shift that all seeds share does not add to the spread."""
    steep = rows("steep", 1, 1e-3, [0.5, 0.7]) + rows("steep", 8, 1e-3, [0.52, 0.72])
    flat = rows("flat", 1, 1e-3, [0.5, 0.7]) + rows("flat", 8, 1e-3, [0.505, 0.705])
    once = rows("once", 1, 1e-3, [0.5]) + rows("once", 8, 1e-3, [0.6])
    table = tables.headroom_table([*steep, *flat, *rows("begun", 1, 1e-3, [0.5, 0.6]), *once])
    assert [line.split(" | ")[0] for line in table[2:]] == ["| steep", "| flat", "| begun", "| once"]
    assert "+2.00 [+2.00, +2.00] | yes" in table[2]
    assert "+0.50 [+0.50, +0.50] | no" in table[3]
    assert "yes" not in table[4]
    assert table[5].endswith("| 60.00 (0.001, 1) |  | +10.00 | open |")


# Pictures


def test_curves_are_drawn_from_the_best_rates(compared: dict[str, list[store.Row]]) -> None:
    """Each rank with rows at its best rate, and the first seed at all rates."""
    (axes,) = plots.draw_sizes(("movie-2",), compared).axes[:1]
    curves: dict[str, Any] = {
        str(each.get_label()): each.lines[0].get_xydata()
        for each in axes.containers
        if isinstance(each, ErrorbarContainer)
    }
    drawn = {
        "LoRA, the headroom's runs": ("lora", "headroom", (1, 2, 8)),
        "LoRA": ("lora", "rates", (1, 8)),
        "AdaLoRA": ("adalora", "rates", (1, 8)),
    }
    assert curves.keys() == drawn.keys()
    for label, (method, grid, ranks) in drawn.items():
        made = {rank: grids.made_for(Run("movie-2", method, rank, 0.0, 0), compared, grid) for rank in ranks}
        assert curves[label].tolist() == [[rank, scores.best(found).mean] for rank, found in made.items()]
    lora_s = [row for row in compared["rates"] if (row["task"], row["method"], row["rank"]) == ("movie-2", "lora", 1)]
    (axes,) = plots.draw_rates(("movie-2",), compared, rank=1).axes[:1]
    lora = next(line for line in axes.lines if line.get_label() == "LoRA")
    tried, accuracies = (np.asarray(values) for values in lora.get_data())
    assert tried.tolist() == sorted({row["learning_rate"] for row in lora_s})
    assert tried[np.argmax(accuracies)] == pytest.approx(2e-3)


def test_a_diverged_run_does_not_set_the_frame() -> None:
    """Values within six points of the best are readable; ticks are the rates that were tried."""
    both = [*rows("movie-2", 8, 1e-3, [0.8]), *rows("movie-2", 8, 2e-3, [0.3])]
    made = [{**row, "method": "lora"} for row in both]
    (axes,) = plots.draw_rates(("movie-2",), {"rates": made}, rank=8).axes[:1]
    assert axes.get_ylim() == (74.0, 80.5)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.001", "0.002"]


def test_learning_rates_show_each_seed_and_only_methods_that_ran() -> None:
    """One dot per seed, a line through the means; the legend covers all panels, not only the first."""
    lora = [{**row, "method": "lora"} for row in rows("movie-2", 1, 1e-3, [0.8, 0.82])]
    peft = [{**row, "method": "peft-adalora"} for row in rows("nyt-3", 1, 2e-3, [0.7])]
    figure = plots.draw_rates(("movie-2", "nyt-3"), {"rates": [*lora, *peft]}, rank=1)
    first = figure.axes[0]
    assert np.asarray(first.lines[0].get_xydata()).tolist() == [[1e-3, pytest.approx(81.0)]]
    (dots,) = first.collections
    assert np.asarray(dots.get_offsets())[:, 1].tolist() == pytest.approx([80.0, 82.0])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["LoRA", "PEFT's AdaLoRA"]


def test_plots_are_written_from_the_rows_that_exist(tmp_path: Path) -> None:
    """Without rows, panels are empty. Ranks come from AdaLoRA's first run on a task."""
    ranks = {f"layer.{layer}.{name}": layer for layer in range(3) for name in ("query", "value")}
    for seed in (10, 11):
        row = {**row_of(Run("amazon-3/qv", "adalora", 1, 1e-3, seed, tested=True), 0.5), "ranks": ranks}
        store.append(tmp_path / "contest.jsonl", row)
    out = tmp_path / "out"
    result = CliRunner().invoke(command.app, ["plots", "--rows", str(tmp_path), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert {file.name for file in out.iterdir()} == {
        "sizes.png",
        "rates-1.png",
        "rates-8.png",
        "ranks-amazon-3-qv-1.png",
    }
    assert plots.draw_map(store.read_all(tmp_path)["contest"][0]).axes[0].get_title() == "amazon-3/qv, rank 1, seed 10"
