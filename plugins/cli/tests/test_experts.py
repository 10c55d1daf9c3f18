"""The command on mixtures of experts: what is adapted, what is said of it, and what is done with the adapter."""

import json
from pathlib import Path
from typing import Any

import pytest

# Imports after a statement: without these plugins this file is skipped, not broken.
for _module in ("tunerkit_adalora", "tunerkit_experts", "tunerkit_lora"):
    pytest.importorskip(_module)

from tests.support.tiny_models import save_tiny_mixtral  # noqa: E402
from tests.support.train_command import command, record_of, succeeded  # noqa: E402
from tunerkit_cli.report.html.grids import heatmap, highest_rank  # noqa: E402
from tunerkit_cli.report.html.tables import targets  # noqa: E402
from tunerkit_cli.report.record import read  # noqa: E402

CONFIGS = {"lora": "{rank: 2}", "adalora": "{target_rank: 2, init_rank: 3}"}
STACKS = [f"model.layers.{n}.mlp.experts.stacks.{name}_proj" for n in (0, 1) for name in ("gate_up", "down")]
each_method = pytest.mark.parametrize("method", CONFIGS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """The folder of a run of each method, and what it printed."""
    folder = tmp_path_factory.mktemp("mixtures")
    base, data = save_tiny_mixtral(folder / "base"), folder / "data.jsonl"
    data.write_text('{"prompt": "the film ", "completion": "very good"}\n' * 16, encoding="utf-8")
    shared = ["--model", base, "--data", data, "--eval-data", data, "--precision", "fp32", "--lr", "0.05"]
    sizes = ["--task", "causal-lm", "--epochs", "3", "--batch-size", "4"]
    found = {}
    for method, config in CONFIGS.items():
        own = ["--method", method, "--config", config, "--out", folder / method]
        found[method] = folder / method, succeeded("train", *own, *shared, *sizes).output
    return found


def json_of(*arguments: object) -> Any:
    return json.loads(succeeded(*arguments, "--json").output)


@each_method
def test_experts_are_adapted_by_default_and_counted(method: str, runs: dict[str, tuple[Path, str]]) -> None:
    """The opening lines, ``show`` of the folder and of the file, and the report's table have their numbers."""
    out, said = runs[method]
    assert f"{method} on 8 matrices and 4 stacks of 4 experts: " in said
    for source in (out, out / "adapter.safetensors"):
        assert "\nstacks      4 stacks of 4 experts\n" in succeeded("show", source).output
    assert json_of("show", out / "adapter.safetensors")["stacks"] == dict.fromkeys(STACKS, 4)
    table = targets(read(record_of(out)))
    assert table is not None
    experts = {row[0]: row[table.columns.index("experts")] for row in table.rows}
    assert len(experts) == 12
    assert {path: count for path, count in experts.items() if count != "–"} == dict.fromkeys(STACKS, "4")


def test_the_rank_map_has_a_cell_for_each_expert(runs: dict[str, tuple[Path, str]]) -> None:
    """With the expert's own rank, which together are the budget, and its own cap."""
    run = read(record_of(runs["adalora"][0]))
    assert {path: sum(ranks) for path, ranks in run.experts.items()} == {path: run.ranks[path] for path in STACKS}
    grid = heatmap(run)
    assert grid is not None
    assert len(grid.rows) == 4 + 2 * 4
    shown = dict(zip(grid.rows, grid.cells, strict=True))
    for path, ranks in run.experts.items():
        layer, name = int(path.split(".")[2]), path.rpartition(".")[2]
        cells = [shown[f"{name}.{expert}"][layer] for expert in range(4)]
        assert [cell and cell.text for cell in cells] == [str(rank) for rank in ranks]
        assert all(cell is not None and "of at most 3" in cell.title for cell in cells)
    assert highest_rank(run) == 3
    assert sum(int(cell.text) for row in grid.cells for cell in row if cell is not None) == sum(run.ranks.values())


def test_the_spectrum_of_a_stack_is_that_of_its_experts(runs: dict[str, tuple[Path, str]]) -> None:
    """As many values as the rank of one expert."""
    spectrum = read(record_of(runs["lora"][0])).spectrum
    assert {len(values) for values in spectrum.values()} == {2}
    assert all(min(spectrum[path]) > 0 for path in STACKS)


@each_method
def test_an_adapter_of_experts_is_compared_converted_and_merged(
    method: str, runs: dict[str, tuple[Path, str]], tmp_path: Path
) -> None:
    """The closest LoRA of a sufficient rank is equal; one of a lower rank differs by the error that is printed."""
    out, merged = runs[method][0], tmp_path / "merged"
    succeeded("merge", out, "--out", merged)
    assert json_of("verify", out, merged)["is_equal"]
    for rank, is_equal in ((3, True), (1, False)):
        other = tmp_path / f"lora-{rank}"
        converted = json_of("convert", out, "--to", "lora", "--rank", rank, "--out", other)
        compared = json.loads(command("diff", out, other, "--json").output)
        assert compared["is_equal"] == is_equal
        for path in STACKS:
            assert compared["products"][path] == pytest.approx(converted["errors"][path], abs=1e-6)
