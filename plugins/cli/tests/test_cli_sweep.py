"""``tunerkit sweep``, end to end: its runs, their comparison, and what stops it."""

import json
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from plugins.cli.tests.product_plugin import ProductPlugin
from tests.support.tiny_classifier import save_tiny_classifier
from tests.support.tiny_models import save_tiny_llama
from tests.support.train_command import command, signalled, succeeded, write_rows
from tunerkit_cli.preparing.session import Session
from tunerkit_cli.running import run
from tunerkit_cli.running.record import Trained
from tunerkit_cli.sweeping import scoring, sweep
from tunerkit_cli.sweeping.statistics import Scores
from tunerkit_cli.tasks.base import Row
from tunerkit_testing.registering import registered


@pytest.fixture
def given(tmp_path: Path) -> Iterator[list[str]]:
    """The arguments of a small sweep's runs, two epochs of 80 rows."""
    save_tiny_classifier(tmp_path / "tiny")
    write_rows(tmp_path / "data.csv", 100)
    settings = [each for text in ("max_length=8", "training.num_train_epochs=2") for each in ("--set", text)]
    with registered(ProductPlugin()):
        yield ["--data", str(tmp_path / "data.csv"), "--model", str(tmp_path / "tiny"), *settings]


def result(folder: Path) -> Any:
    """What a sweep has written of its comparison."""
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def test_a_sweep_that_was_interrupted_ends_as_one_that_was_not(given: list[str], tmp_path: Path) -> None:
    """Its runs are those of `tunerkit train`, and none is trained twice."""
    axes = ("--method", "toy-product", "--lr", "1e-4,3e-2", "--seeds", "2")
    done = succeeded("sweep", *given, *axes, "--out", tmp_path / "whole")
    assert "take learning_rate" in done.output
    assert "4 runs, 2 seeds" in done.output
    whole = result(tmp_path / "whole")
    report = (tmp_path / "whole" / "report.html").read_text(encoding="utf-8")
    assert whole["sentence"][1:] in report
    assert "Accuracy in % over the learning rate" in report
    with signalled(2, signal.SIGINT):
        stopped = command("sweep", *given, *axes, "--out", tmp_path / "stopped")
    assert stopped.exit_code == 130
    assert f"go on with: tunerkit sweep --out {tmp_path / 'stopped'} --resume" in stopped.stderr
    calls = mock.Mock(side_effect=sweep.run)
    with mock.patch.object(sweep, "run", calls):
        succeeded("sweep", "--out", tmp_path / "stopped", "--resume")
    assert calls.call_count == 4
    again = result(tmp_path / "stopped")
    assert [{**each, "seconds": 0} for each in again["settings"]] == [
        {**each, "seconds": 0} for each in whole["settings"]
    ]
    assert again["sentence"] == whole["sentence"]
    single = tmp_path / "whole" / "02-learning_rate-3e-2" / "seed-1"
    assert "toy-product" in succeeded("show", single).output
    scores = json.loads((single / sweep.SCORES).read_text(encoding="utf-8"))
    fewer = {**scores, "judging": scores["judging"][1:]}
    (single / sweep.SCORES).write_text(json.dumps(fewer), encoding="utf-8")
    refused = command("sweep", "--out", tmp_path / "whole", "--resume")
    assert "its runs leave out different rows" in refused.stderr
    with mock.patch.object(sweep, "run", calls):  # all have ended but those of a third seed
        succeeded("sweep", "--out", tmp_path / "stopped", "--resume", "--seeds", "3")
    assert calls.call_count == 6
    assert result(tmp_path / "stopped")["seeds"] == 3
    (tmp_path / "data.csv").write_text("text,label\n" + "good film,good\nbad film,bad\n" * 50, encoding="utf-8")
    changed = command("sweep", "--out", tmp_path / "stopped", "--resume")
    assert "data.csv: has changed since this sweep began" in changed.stderr


def test_scores_stand_at_their_rows(given: list[str], tmp_path: Path) -> None:
    """Those of a run's own evaluation, and those that are computed, are what the model predicts for the row alone."""
    both: list[tuple[list[float], list[float]]] = []

    def recording(session: Session, rows: Sequence[Row], right: Sequence[bool] | None = None) -> Scores:
        found = scoring.row_scores(session, rows, right)
        predicted = session.task.predict(session.loaded, rows, batch_size=1)
        wanted = [float(one["label"] == row["label"]) for one, row in zip(predicted, rows, strict=True)]
        both.append((found.tolist(), wanted))
        return found

    with mock.patch.object(sweep, "row_scores", recording):
        succeeded(
            "sweep", *given, "--method", "toy-product", "--lr", "1e-2,3e-2", "--seeds", "1", "--out", tmp_path / "out"
        )
    assert [found for found, _ in both] == [wanted for _, wanted in both]
    assert {score for found, _ in both for score in found} == {0, 1}


def test_losses_stand_at_their_rows(tmp_path: Path) -> None:
    """Each is that of the row alone, in a run whose trainer groups batches by length."""
    pytest.importorskip("trl")
    save_tiny_llama(tmp_path / "tiny")
    rows = "".join(json.dumps({"text": "a film " * (1 + number * 7 % 9)}) + "\n" for number in range(48))
    (tmp_path / "data.jsonl").write_text(rows, encoding="utf-8")
    both: list[tuple[list[float], list[float]]] = []

    def recording(session: Session, rows: Sequence[Row], right: Sequence[bool] | None = None) -> Scores:
        assert session.trainer.args.train_sampling_strategy == "group_by_length"
        found = scoring.row_scores(session, rows, right)
        both.append((found.tolist(), [float(scoring.row_scores(session, [row])[0]) for row in rows]))
        return found

    settings = ("task=causal-lm", "training.max_steps=2", "training.train_sampling_strategy=group_by_length")
    given = ("--data", tmp_path / "data.jsonl", "--model", tmp_path / "tiny", *(f"--set={each}" for each in settings))
    with mock.patch.object(sweep, "row_scores", recording), registered(ProductPlugin()):
        succeeded(
            *("sweep", *given, "--method", "toy-product", "--lr", "1e-3,1e-2"),
            *("--seeds", "1", "--out", tmp_path / "out"),
        )
    assert len(both) == 4
    for found, wanted in both:
        assert found == pytest.approx(wanted, abs=1e-5)
        assert len({round(score, 3) for score in found}) > 3  # of different lengths, so that another order would show


def test_a_run_that_could_not_be_evaluated_has_no_scores(given: list[str], tmp_path: Path) -> None:
    """It is left out, and trained anew by ``--resume``."""
    axes = ("--method", "toy-product", "--lr", "1e-3,1e-2,3e-2", "--seeds", "1", "--out", tmp_path / "out")
    evaluate = run.evaluate

    def failing(session: Session, trained: Trained) -> Trained:
        if session.trainer.args.learning_rate == 1e-2:
            raise RuntimeError("no such metric")
        return evaluate(session, trained)

    with mock.patch.object(run, "evaluate", failing):
        done = succeeded("sweep", *given, *axes)
    assert "Failed, and left out: learning_rate 1e-2 (seed 0: the adapter is trained" in " ".join(done.output.split())
    assert len(list((tmp_path / "out").glob("*/seed-0/scores.json"))) == 2
    succeeded("sweep", "--out", tmp_path / "out", "--resume")
    assert len(result(tmp_path / "out")["settings"]) == 3


def test_methods_are_compared_each_at_its_best_rate(given: list[str], tmp_path: Path) -> None:
    """Half of the rates have one seed alone; the methods have equal sizes."""
    compared = ("--methods", "lora,adalora", "--sizes", "2", "--seeds", "2")
    done = succeeded("sweep", *given, *compared, "--out", tmp_path / "out")
    assert "10 runs, 2 seeds" in done.output  # three rates with one seed, two of them with another
    found = result(tmp_path / "out")
    assert sorted(each["name"] for each in found["settings"]) == ["adalora of size 2", "lora of size 2"]
    assert found["sentence"].startswith(("take lora of size 2 with learning_rate", "take adalora of size 2 with "))
    parameters = [each["parameters"] for each in found["settings"]]
    assert max(parameters) < 1.1 * min(parameters)
    calls = mock.Mock(side_effect=sweep.run)
    with mock.patch.object(sweep, "run", calls):  # the rounds are those of before, whatever later seeds reached
        succeeded("sweep", "--out", tmp_path / "out", "--resume")
    assert calls.call_count == 0


def test_what_fails_is_said_and_the_others_go_on(given: list[str], tmp_path: Path) -> None:
    """One setting fails in its first run, and is left out of the comparison, by name."""
    run = sweep.run

    def failing(recipe: Any, *arguments: Any, **options: Any) -> None:
        if recipe.config["rank"] == 3:
            raise RuntimeError("out of luck")
        run(recipe, *arguments, **options)

    axes = ("--method", "toy-product", "--set", "config.rank=2,3,4", "--seeds", "1")
    with mock.patch.object(sweep, "run", failing):
        done = succeeded("sweep", *given, *axes, "--out", tmp_path / "out")
        assert "rank 3, seed 0 failed: out of luck" in done.output
        assert "Failed, and left out: rank 3" in result(tmp_path / "out")["sentence"]
        assert "With one seed no difference can be told: --seeds 3" in result(tmp_path / "out")["sentence"]
        failed = command("sweep", *given, *axes[:3], "config.rank=2,3", "--out", tmp_path / "two")
    assert failed.exit_code == 2
    assert "fewer than two settings are left to compare" in failed.stderr


def test_what_cannot_be_swept_is_refused_before_anything_runs(given: list[str], tmp_path: Path) -> None:
    """Each in one line, and nothing is written."""
    axes = ("--method", "toy-product", "--lr", "1e-3,1e-2")

    def said(*arguments: object) -> str:
        failed = command("sweep", *given, *axes, "--out", tmp_path / "out", *arguments)
        assert failed.exit_code == 2
        assert not (tmp_path / "out").exists()
        return str(failed.stderr)

    assert "there is no key 'rnk' in 'config'; did you mean" in said("--set", "config.rnk=2,4")
    assert "--sizes: expected ranks of LoRA" in said("--sizes", "2,x")
    assert "leave --method out" in said("--methods", "lora,adalora")
    (tmp_path / "mine.py").write_text("def mine(given, right):\n    return 1.0\n")
    assert "is code; read it, and pass --allow-code" in said("--set", f"metric={tmp_path / 'mine.py'}:mine")
    sized = command("sweep", *given, "--methods", "lora,dora", "--sizes", "6", "--set", "config.rank=2,4")
    assert "config.rank: changes the size of a method, which --sizes sets" in sized.stderr
    one = command("sweep", *given, "--methods", "lora", "--out", tmp_path / "out")
    assert "nothing to compare lora with" in one.stderr
    assert "expected a number above 0, got -1.0" in said("--hours", "-1")
    assert "leave the other options out" in said("--resume")
    few = write_rows(tmp_path / "few.csv", 2)
    assert "2 held-out rows are too few for a sweep" in said("--eval-data", few)
    other = command("sweep", *given[:2], "--lr", "1e-3,1e-2", "--out", tmp_path, *given[2:])
    assert "is not empty; go on with its sweep by --resume" in other.stderr
    none = command("sweep", "--out", tmp_path / "none", "--resume")
    assert "there is no sweep to go on with (sweep.json is missing)" in none.stderr


def test_hours_that_allow_not_one_run_of_each_are_said_at_once(given: list[str], tmp_path: Path) -> None:
    """After the first run, with the hours that would do; the run stays."""
    axes = ("--method", "toy-product", "--lr", "1e-3,1e-2", "--seeds", "1", "--out", tmp_path / "out")
    failed = command("sweep", *given, *axes, "--hours", "1e-6")
    assert failed.exit_code == 2
    assert "--hours 1e-06 allow not one run of each setting" in failed.stderr
    assert "take learning_rate" in succeeded("sweep", "--out", tmp_path / "out", "--resume").output
