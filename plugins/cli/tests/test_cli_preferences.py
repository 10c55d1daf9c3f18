"""The tasks on better and worse answers, as commands: resuming, rewards, and rows that do not fit."""

import json
import math
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from tests.support.tiny_classifier import save_tiny_classifier
from tests.support.tiny_models import save_tiny_llama
from tests.support.train_command import command, signalled, succeeded
from tunerkit_cli.rows import BadValue, DataError
from tunerkit_cli.tasks import task_of
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import LowRankPlugin

pytest.importorskip("trl")
PAIRS: list[dict[str, Any]] = [{"prompt": "the film ", "chosen": "good", "rejected": "bad"}] * 40
JUDGED = [{"prompt": "the film ", "completion": answer, "label": answer == "good"} for answer in ("good", "bad") * 20]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a small language model and rows."""
    folder = tmp_path_factory.mktemp("given")
    save_tiny_llama(folder / "tiny")
    for name, rows in (("pairs", PAIRS), ("judged", JUDGED)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with registered(LowRankPlugin()):
        yield folder


def arguments(task: str, given: Path, data: str) -> list[str]:
    """A run of 16 steps that checkpoints at each fourth."""
    return [
        *("train", "--task", task, "--data", str(given / data), "--model", str(given / "tiny")),
        *("--method", "toy-low-rank", "--config", "{rank: 2}", "--epochs", "4", "--lr", "0.02"),
        *("--set", "save_steps=4", "--max-length", "32"),
    ]


@pytest.mark.parametrize(
    ("task", "data"), [("orpo", "pairs.jsonl"), ("kto", "judged.jsonl"), ("reward", "pairs.jsonl")]
)
def test_a_resumed_run_ends_bit_identical(task: str, data: str, given: Path, tmp_path: Path) -> None:
    """It was interrupted between two checkpoints; the loss has fallen below that of no difference."""
    succeeded(*arguments(task, given, data), "--out", tmp_path / "whole")
    with signalled(10, signal.SIGINT):
        assert command(*arguments(task, given, data), "--out", tmp_path / "out").exit_code == 130
    succeeded("train", "--out", tmp_path / "out", "--resume")
    whole, resumed = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "out"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    metrics = json.loads((tmp_path / "whole" / "run.json").read_text(encoding="utf-8"))["metrics"]
    margin = metrics["margin" if task == "reward" else "reward_margin"]
    assert margin > 0


def test_a_reward_model_scores_the_better_answer_higher(given: Path, tmp_path: Path) -> None:
    """`predict` takes a prompt with an answer, and says so where it gets a text alone."""
    out = tmp_path / "out"
    succeeded(*arguments("reward", given, "pairs.jsonl"), "--out", out)
    asked = tmp_path / "asked.jsonl"
    rows = [{"prompt": "the film ", "completion": answer} for answer in ("good", "bad")]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    good, bad = (json.loads(line)["value"] for line in succeeded("predict", out, "--data", asked).stdout.splitlines())
    assert good > bad
    pairs = command("predict", out, "--data", given / "pairs.jsonl")
    assert "reward scores one answer of each row; say which of a pair with --column completion=chosen" in pairs.stderr
    chosen = succeeded("predict", out, "--data", given / "pairs.jsonl", "--column", "completion=chosen")
    assert len(chosen.stdout.splitlines()) == len((given / "pairs.jsonl").read_text().splitlines())
    asked.write_text(json.dumps(rows[0]) + "\n" + json.dumps({**rows[1], "completion": ""}) + "\n", encoding="utf-8")
    holes = command("predict", out, "--data", asked)
    assert "row 2, column 'completion': the text is empty" in holes.stderr
    assert "(1 of 2 rows)" in holes.stderr  # no recipe leaves them out
    alone = command("predict", out, "--text", "good")
    assert "reward needs a column 'completion'" in alone.stderr
    assert "--data FILE" in succeeded(*arguments("reward", given, "pairs.jsonl"), "--out", tmp_path / "again").output


@pytest.mark.parametrize(
    ("label", "expected"), [(True, True), (0, False), ("True ", True), ("false", False), ("1", True), ("0.0", False)]
)
def test_labels_of_answers_are_read_in_their_usual_forms(label: object, expected: bool) -> None:
    """As JSON, a table or a spreadsheet has them."""
    row = task_of("kto").checked({"prompt": "x", "completion": "y", "label": label})
    assert row["label"] is expected


@pytest.mark.parametrize("label", ["good", 2, None, [True], math.nan])
def test_other_labels_of_answers_are_refused(label: object) -> None:
    """None is guessed."""
    with pytest.raises(BadValue, match="expected true for a good answer or false for a bad one"):
        task_of("kto").checked({"prompt": "x", "completion": "y", "label": label})


def test_a_trl_without_orpo_is_one_error(given: Path, tmp_path: Path) -> None:
    """TRL calls it experimental, and may move it."""
    with mock.patch.dict(sys.modules, {"trl.experimental.orpo": None}):
        refused = command(*arguments("orpo", given, "pairs.jsonl"), "--out", tmp_path / "out")
    assert "needs TRL's ORPOTrainer, which the installed TRL" in refused.stderr
    assert refused.exit_code == 2


def test_an_encoder_without_an_end_token_scores_too(given: Path, tmp_path: Path) -> None:
    """It marks the end itself."""
    save_tiny_classifier(given / "bert")
    run = [
        str(given / "bert") if each == str(given / "tiny") else each
        for each in arguments("reward", given, "pairs.jsonl")
    ]
    succeeded(*run, "--out", tmp_path / "out")
    scored = succeeded("predict", tmp_path / "out", "--data", given / "pairs.jsonl", "--column", "completion=chosen")
    assert "value" in json.loads(scored.stdout.splitlines()[0])


@pytest.mark.parametrize(("label", "said"), [(True, "is a good answer"), (False, "is a bad answer")])
def test_answers_of_one_kind_are_refused(label: bool, said: str) -> None:
    """There is nothing to compare them with."""
    with pytest.raises(DataError, match=said):
        task_of("kto").labels([{"label": label}] * 3)


def test_rows_whose_prompt_leaves_no_room_are_left_out(given: Path, tmp_path: Path) -> None:
    """`orpo` would train them with an empty answer."""
    data = tmp_path / "long.jsonl"
    rows = [*PAIRS, *[{**PAIRS[0], "prompt": "the film " * 40}] * 5]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    done = succeeded(*arguments("orpo", given, str(data)), "--dry-run", "--out", tmp_path / "out")
    assert "left out" in done.output
