"""``tunerkit train`` with AdaLoRA: a run that is resumed before, during and after pruning, bit for bit."""

import signal
from pathlib import Path

import pytest
import yaml

# Imports after a statement: without the extra this file is skipped, not broken.
for _module in ("datasets", "platformdirs", "pyarrow", "rich", "sklearn", "transformers", "typer", "yaml"):
    pytest.importorskip(_module, reason="the command needs the extra [cli]")

from tests.support.train_command import (  # noqa: E402
    arguments_of,
    check_resumed_after_ctrl_c,
    check_resumed_after_kill,
    collapsing,
    command,
    record_of,
    signalled,
    succeeded,
    write_rows,
)

# Of 24 steps: none is pruned to step 4; allocations at 6, 8, ..., 14, where the ranks are final.
CONFIG = "{target_rank: 2, init_rank: 3, t_init: 4, t_final: 10, delta_t: 2}"


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments of a run, without ``--out``."""
    return arguments_of(tmp_path_factory.mktemp("adalora"), "adalora", CONFIG)


@pytest.fixture(scope="module")
def out(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that run, ended."""
    folder = tmp_path_factory.mktemp("ended") / "out"
    succeeded(*arguments, "--out", folder)
    return folder


def test_the_record_has_the_budget_the_ranks_and_the_spectrum(out: Path) -> None:
    """The budget starts at the initial ranks, ends at the target, and is spent; as many singular values are not 0."""
    record = record_of(out)
    assert record["budget"] == {"start": 36, "end": 24, "live": sum(record["ranks"].values()), "unit": "rank"}
    assert record["budget"]["live"] == 24
    assert record["history"][0] == {"step": 0, "budget": 36, "ranks": [3] * 12}
    assert record["history"][-1]["ranks"] == list(record["ranks"].values())
    assert {path: len(values) for path, values in record["spectrum"].items()} == record["ranks"]
    assert all(values == sorted(values, reverse=True) for values in record["spectrum"].values())
    assert record["config"]["target_rank"] == 2
    shown = succeeded("show", out).output
    assert "target_rank: 2" in shown
    assert succeeded("predict", out, "--text", "good film").output.count("\n") == 1


def test_a_run_whose_recipe_names_no_method_goes_on_with_adalora(
    arguments: list[str], out: Path, tmp_path: Path
) -> None:
    """It was begun when AdaLoRA was the default, which LoRA is now."""
    parts = tmp_path / "parts"
    with signalled(11, signal.SIGINT):
        assert command(*arguments, "--out", parts).exit_code == 130
    recipe = yaml.safe_load((parts / "recipe.yaml").read_text())
    del recipe["method"]
    (parts / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    succeeded("train", "--out", parts, "--resume")
    assert (parts / "adapter.safetensors").read_bytes() == (out / "adapter.safetensors").read_bytes()


def test_after_ctrl_c_the_end_is_that_of_an_uninterrupted_run(arguments: list[str], out: Path, tmp_path: Path) -> None:
    """Before the first checkpoint, while pruning in the middle of an epoch, and after the last allocation."""
    check_resumed_after_ctrl_c(arguments, out, tmp_path / "parts", at=(1, 11, 23))


def test_a_run_of_an_earlier_version_keeps_the_alpha_that_was_the_default_then(
    arguments: list[str], out: Path, tmp_path: Path
) -> None:
    """The default was 2 init_rank. Its recipe is silent about it, and its checkpoint is not."""
    parts = tmp_path / "parts"
    call = [*arguments]
    call[call.index(CONFIG)] = CONFIG.replace("}", ", alpha: 6}")
    with signalled(11, signal.SIGINT):
        assert command(*call, "--out", parts).exit_code == 130
    recipe = yaml.safe_load((parts / "recipe.yaml").read_text())
    del recipe["config"]["alpha"]
    (parts / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    succeeded("train", "--out", parts, "--resume")
    assert record_of(out)["config"]["alpha"] != 6
    assert record_of(parts)["config"]["alpha"] == 6


def test_after_kill_9_the_end_is_that_of_an_uninterrupted_run(arguments: list[str], out: Path, tmp_path: Path) -> None:
    """Before the first checkpoint, while pruning in the middle of an epoch, and after the last allocation."""
    check_resumed_after_kill(arguments, (), out, tmp_path / "parts", at=(1, 11, 23))


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The arguments of a run that may be restarted, and the folder of that run, ended as it is."""
    folder = tmp_path_factory.mktemp("longer")
    options = arguments_of(folder, "adalora", "{target_rank: 2, init_rank: 3, t_init: 20, t_final: 100, delta_t: 10}")
    write_rows(folder / "more.csv", 400)
    options[options.index("--data") + 1] = str(folder / "more.csv")
    options += ["--precision", "fp32", "--batch-size", "8", "--epochs", "5", "--max-length", "16"]
    succeeded(*options, "--out", folder / "plain")
    return options, folder / "plain"


@pytest.mark.parametrize("lost", [61, 121])
def test_a_restarted_run_goes_on_with_the_ranks_and_the_schedule_of_its_checkpoint(
    longer: tuple[list[str], Path], lost: int, tmp_path: Path
) -> None:
    """While it prunes, and after it: budget and steps are those of a run that was not restarted.

    Up to the checkpoint the record is that run's too, and the file can be loaded.
    """
    options, ended = longer
    with collapsing(lost):
        done = succeeded(*options, "--out", tmp_path / "out", "--set", "on_collapse=restart")
    plain, record = record_of(ended), record_of(tmp_path / "out")
    assert "problems" not in plain
    (restart,) = record["restarts"]
    assert restart["from_step"] == lost - 1
    assert f"restarted from step {lost - 1} at half the learning rate, 0.005" in done.stdout
    assert [(each["step"], each["budget"]) for each in record["history"]] == [
        (each["step"], each["budget"]) for each in plain["history"]
    ]
    both = zip(record["history"], plain["history"], strict=True)
    assert all(one["ranks"] == other["ranks"] for one, other in both if one["step"] < lost)
    losses, others = ({e["step"]: e["loss"] for e in each["logs"] if "loss" in e} for each in (record, plain))
    assert losses.keys() == others.keys()
    assert all(losses[step] == others[step] for step in losses if step < lost)
    assert record["budget"] == {"start": 36, "end": 24, "live": 24, "unit": "rank"}
    assert record["metrics"]["accuracy"] > 0.9
    assert succeeded("predict", tmp_path / "out", "--text", "good film").output.count("\n") == 1
