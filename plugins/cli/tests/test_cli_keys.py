"""Keys of a recipe that change how a run trains: early stopping, weights of classes, and how attention is computed."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.toy_growing import GrowingPlugin
from tests.support.train_command import arguments_of, command, record_of, signalled, succeeded
from tunerkit.errors import ConfigError
from tunerkit_cli.preparing.trainer import asked_of
from tunerkit_cli.recipes.recipe import Recipe
from tunerkit_cli.tasks import task_of
from tunerkit_cli.tasks.weights import class_weights, weighted_loss
from tunerkit_testing.registering import registered

ROWS = [{"label": label} for label in ("good", "good", "good", "bad")]
LABELS = ("bad", "good")


@pytest.fixture(autouse=True, scope="module")
def _toys() -> Iterator[None]:
    with registered(GrowingPlugin()):
        yield


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of 24 steps in three epochs, with rows that are held out."""
    folder = tmp_path_factory.mktemp("keys")
    return [*arguments_of(folder, "toy-growing", "{every: 6, max_rank: 3}"), "--precision", "fp32"]


def setting(*settings: str) -> list[str]:
    return [word for each in settings for word in ("--set", each)]


def test_a_run_stops_early_and_keeps_its_best_checkpoint(arguments: list[str], tmp_path: Path) -> None:
    """Law: it ends after so many evaluations without a better score, with the best weights, resumed or not."""
    out, never = tmp_path / "out", ("learning_rate=1e-12", "metric_for_best_model=accuracy", "num_train_epochs=5")
    options = [*arguments, "--out", out, *setting("early_stopping_patience=2", *never)]
    with signalled(20, signal.SIGINT):
        assert command(*options).exit_code == 130
    said = succeeded("train", "--out", out, "--resume").output
    assert "stopped early, after step 24 of 40: the best is step 8, whose checkpoint is kept" in said
    record = record_of(out)
    assert [each["step"] for each in record["logs"] if "eval_accuracy" in each] == [8, 16, 24]
    assert record["recipe"]["training"]["save_strategy"] == "epoch"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("eval_strategy=no", "early_stopping_patience and load_best_model_at_end need evaluations: hold rows out"),
        (
            "load_best_model_at_end=false",
            "early_stopping_patience: keeps the best checkpoint; leave training.load_b",
        ),
    ],
)
def test_stopping_early_needs_evaluations(option: str, message: str, arguments: list[str], tmp_path: Path) -> None:
    """One line, before anything is trained."""
    done = command(*arguments, "--out", tmp_path / "out", *setting("early_stopping_patience=2", option))
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr


def test_the_best_checkpoint_is_one_of_those_that_are_evaluated() -> None:
    """Law: a run that keeps the best saves as often as it evaluates, the demo too, unless the recipe says otherwise."""
    task = task_of("text-classification")
    epochs = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
    assert asked_of(Recipe(early_stopping_patience=2), task) == epochs
    steps = {**epochs, "eval_strategy": "steps", "eval_steps": 5}
    wanted = {**steps, "save_strategy": "steps", "save_steps": 5}
    assert asked_of(Recipe(training={**steps, "save_strategy": "steps"}, data="d.csv"), task) == wanted
    assert asked_of(Recipe(training={"seed": 1}, data="d.csv"), task) == {"seed": 1}


def test_weights_of_classes_have_a_mean_of_one_over_the_rows() -> None:
    """Law: so the loss stays comparable; balanced gives each class the same part of it."""
    task = task_of("text-classification")
    assert class_weights("balanced", task, ROWS, LABELS) == pytest.approx([2, 2 / 3])
    assert class_weights([3, 1], task, ROWS, LABELS) == pytest.approx([2, 2 / 3])
    assert class_weights({"bad": 3}, task, ROWS, LABELS) == pytest.approx([2, 2 / 3])


@pytest.mark.parametrize(
    ("given", "task", "message"),
    [
        ("balance", "text-classification", "expected balanced, a list or a mapping, got 'balance'; did you mean 'bala"),
        ([1, 2, 3], "text-classification", "expected 2 weights, got 3; the classes are bad, good"),
        ({"god": 1}, "text-classification", "class_weights.god: there is no such class; did you mean 'good'"),
        ([0, 0], "image-classification", "no class of a training row has a weight above 0"),
        ("balanced", "regression", "class_weights: regression has none; they are for text-classification, token-"),
    ],
)
def test_weights_that_do_not_fit_are_one_error(given: Any, task: str, message: str) -> None:
    """It names the classes, and the closest one."""
    with pytest.raises(ConfigError, match=message):
        class_weights(given, task_of(task), ROWS, LABELS)


def test_the_weighted_loss_is_that_of_rows_that_stand_several_times() -> None:
    """Law: a weight of three counts as three equal rows, also for words, and in parts of a batch."""
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 2, dtype=torch.float64), torch.tensor([[0, 1, 1, -100], [1, 0, -100, 1]])
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    wanted = (each * torch.tensor([3.0, 1.0])[labels.flatten().clamp(min=0)]).sum() / 6
    loss = weighted_loss([3.0, 1.0])
    assert torch.allclose(loss({"logits": logits}, labels), wanted)
    halves = [loss({"logits": logits[i : i + 1]}, labels[i : i + 1], num_items_in_batch=6) for i in range(2)]
    assert torch.allclose(sum(halves), wanted)


def test_a_run_learns_with_weights_and_with_another_attention(arguments: list[str], tmp_path: Path) -> None:
    """Both change what is computed, and are in the recipe of the run."""
    losses = {}
    for name, options in {"plain": (), "bad": ("class_weights={bad: 9}", "attn_implementation=eager")}.items():
        succeeded(*arguments, "--out", tmp_path / name, *setting("max_steps=2", *options))
        losses[name] = [each["loss"] for each in record_of(tmp_path / name)["logs"] if "loss" in each]
    assert losses["plain"] != losses["bad"]
    assert record_of(tmp_path / "bad")["recipe"]["class_weights"] == {"bad": 9}
    done = command(*arguments, "--out", tmp_path / "no", *setting("class_weights={badd: 9}"))
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "class_weights.badd: there is no such class; did you mean 'bad'?; the classes are bad, good" in done.stderr
