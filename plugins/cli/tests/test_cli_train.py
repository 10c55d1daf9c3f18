"""``tunerkit train`` from data to a usable folder, with toy methods: record, resuming, recipes and prediction."""

import io
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import attrs
import pytest
import torch
import transformers
import yaml
from rich.console import Console
from transformers import TrainerControl, TrainerState

import tunerkit
from tests.support.tiny_models import SIDE, save_tiny_llama, save_tiny_vit
from tests.support.toy_growing import GrowingPlugin
from tests.support.train_command import (
    arguments_of,
    assert_same_end,
    check_resumed_after_ctrl_c,
    check_resumed_after_kill,
    collapsing,
    command,
    in_process,
    record_of,
    signalled,
    succeeded,
    write_rows,
)
from tunerkit.plugin import MethodInfo
from tunerkit_cli.folder import DIGESTS, RunFolder
from tunerkit_cli.machine.hardware import computing_in
from tunerkit_cli.outputs import OutputError
from tunerkit_cli.plugin_commands import Addition
from tunerkit_cli.preparing import data as running_data, resuming
from tunerkit_cli.preparing.session import settled
from tunerkit_cli.preparing.trainer import asked_of
from tunerkit_cli.recipes import reading
from tunerkit_cli.recipes.recipe import Recipe, to_mapping
from tunerkit_cli.rows import read_table
from tunerkit_cli.running import baseline, describing, run as running, using
from tunerkit_cli.tasks import task_of
from tunerkit_cli.tasks.texts import TextClassification
from tunerkit_cli.watching.callback import LostError, Watching
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import LowRankPlugin
from tunerkit_transformers.exact_resuming import Resumable
from tunerkit_transformers.output_folder import read_run
from tunerkit_transformers.pretrained import load_pretrained

PLUGINS = (GrowingPlugin, LowRankPlugin)


@pytest.fixture(autouse=True, scope="module")
def _toys() -> Iterator[None]:
    with registered(*(plugin() for plugin in PLUGINS)):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny classifier, ``tiny``, and forty rows, ``data.csv``."""
    return tmp_path_factory.mktemp("train")


@pytest.fixture(autouse=True, scope="module")
def arguments(folder: Path) -> list[str]:
    """The arguments of a run with a method that has ranks, a history and factors, and a seed that is not 0.

    Its results are compared with what is computed in fp32.
    """
    return [*arguments_of(folder, "toy-growing", "{every: 6, max_rank: 3}"), "--precision", "fp32"]


@pytest.fixture(scope="module")
def out(arguments: list[str], folder: Path) -> Path:
    """The folder of that run, ended."""
    succeeded(*arguments, "--out", folder / "out")
    return folder / "out"


def data_of(folder: Path, **training: Any) -> running_data.Data:
    recipe = Recipe(model=str(folder / "tiny"), data=str(folder / "data.csv"), training=training)
    return running_data.prepare_data(recipe, Console(quiet=True))[1]


def logits(folder: Path, texts: list[str]) -> torch.Tensor:
    model, tokenizer = tunerkit.from_folder(folder)
    with torch.no_grad():
        encoded = tokenizer(texts, padding=True, truncation=True, max_length=8, return_tensors="pt")
        found: torch.Tensor = model(**encoded).logits
    return found


def test_the_record_tells_the_truth(out: Path, folder: Path) -> None:
    """The accuracy is that of a new base with the adapter, and ranks, sizes and spectrum are those of its file."""
    assert {"adapter.safetensors", "run.json", "recipe.yaml", "environment.json", "tokenizer.json", "checkpoints"} <= {
        file.name for file in out.iterdir()
    }
    record, held_out = record_of(out), data_of(folder).held_out
    assert {file.name for file in (out / "checkpoints").iterdir()} == {"checkpoint-24"}  # it took no minute
    assert [each["chosen"] for each in record["savings"]] == ["from the first token"]
    assert record["rows"] == {"train": 32, "eval": 8}
    predicted = logits(out, [row["text"] for row in held_out]).argmax(-1).tolist()
    truth = [record["labels"].index(row["label"]) for row in held_out]
    assert record["metrics"]["accuracy"] == sum(map(int.__eq__, predicted, truth)) / 8
    pairs = [*zip(truth, predicted, strict=True)]
    assert record["confusion"] == [[pairs.count((row, column)) for column in (0, 1)] for row in (0, 1)]
    assert record["budget"] == {"start": 12, "end": 36, "live": sum(record["ranks"].values()), "unit": "rank"}
    assert [entry["step"] for entry in record["history"]] == [0, 6, 12, 24]
    assert record["history"][-1]["ranks"] == list(record["ranks"].values())
    assert record["steps"] == 24
    model, _ = tunerkit.from_folder(out)
    for path, values in record["spectrum"].items():
        adapter: Any = tunerkit.tuner(model).adapters()[path]
        delta = 0.5 * adapter.b @ adapter.a
        exact = torch.linalg.svdvals(delta)[: len(values)]
        assert torch.allclose(torch.tensor(values), exact, rtol=1e-4, atol=1e-6)
        assert record["sizes"][path] == adapter.a.numel() + adapter.b.numel()
    assert record["spectrum"].keys() == record["sizes"].keys() == record["ranks"].keys()
    assert record["parameters"]["trained"] == sum(
        record["parameters"][part] for part in ("adapters", "copies", "biases")
    )


def test_a_run_computes_in_its_precision_from_training_to_prediction(folder: Path, arguments: list[str]) -> None:
    """It is said, and recorded; what goes on from the run has it too, unless something else is asked for."""
    out = folder / "bf16"
    done = succeeded(*arguments[:-2], "--set", "training.bf16=true", "--out", out)
    assert "precision: bf16 on cpu\n" in done.output
    record = record_of(out)
    assert record["precision"] == record["recipe"]["precision"] == "bf16"
    assert "bf16" not in record["recipe"]["training"]
    assert "in bf16" in (out / "report.html").read_text()
    predicted = using.predict_rows(out, ["good film"], base=None, batch_size=1)
    with_autocast, without = logits_of(out, "bf16"), logits_of(out, "fp32")
    assert not torch.equal(with_autocast, without)
    assert predicted[0]["score"] == pytest.approx(float(with_autocast.float().softmax(-1).max()), abs=1e-6)
    flags = ("--epochs", "1", "--lr", "0.01", "--batch-size", "4", "--data", str(folder / "data.csv"))
    for asked, found in (((), "bf16"), (("--precision", "fp32"), "fp32"), (("--set", "training.bf16=false"), "fp32")):
        said = succeeded("train", "--from", out, *flags, *asked, "--out", folder / "more", "--dry-run").output
        assert f"precision: {found} on cpu\n" in said


def logits_of(out: Path, precision: str) -> torch.Tensor:
    model, tokenizer = tunerkit.from_folder(out)
    with torch.no_grad(), computing_in(precision, torch.device("cpu")):
        found: torch.Tensor = model(**tokenizer("good film", return_tensors="pt")).logits
    return found


def test_a_precision_that_contradicts_another_is_one_error(folder: Path, arguments: list[str], tmp_path: Path) -> None:
    """Two words for it at once; a run that is resumed in another; and one that the machine does not have."""
    out, arguments = tmp_path / "out", arguments[:-2]  # those of a run that does not say its precision
    both = command(*arguments, "--precision", "fp32", "--set", "training.fp16=true", "--out", out)
    assert both.exit_code == 2
    assert "precision: fp32 was given, and training.fp16 too; leave training.fp16 out" in both.stderr
    absent = command(*arguments, "--precision", "fp16", "--out", out)
    assert "precision: fp16 was asked for, and fp16 needs an accelerator, and there is none" in absent.stderr
    mistyped = command(*arguments, "--precision", "bf61", "--out", out)
    assert "precision: expected fp32, bf16 or fp16, got 'bf61'; did you mean 'bf16'?" in mistyped.stderr
    assert not out.exists()
    with signalled(2, signal.SIGINT):
        assert command(*arguments, "--precision", "bf16", "--out", out).exit_code == 130
    for call in (arguments, ["train"]):
        other = command(*call, "--precision", "fp32", "--out", out, "--resume")
        assert "--resume: precision was 'bf16' and is 'fp32' now" in other.stderr
    succeeded(*arguments, "--out", out, "--resume")
    assert record_of(out)["precision"] == "bf16"


def test_a_run_that_an_earlier_version_began_keeps_the_defaults_of_then(arguments: list[str], tmp_path: Path) -> None:
    """Its recipe left them to the task and to the method, which have other defaults now. No earlier recipe has them."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    then = {"learning_rate": 1e-3, "warmup_steps": 0.06, "adam_beta2": 0.999, "max_grad_norm": 1.0}
    rate = arguments.index("--lr")
    call = [
        *arguments[:rate],
        *arguments[rate + 2 :],
        *(part for name, value in {**then, "loss": "trl"}.items() for part in ("--set", f"{name}={value}")),
    ]
    succeeded(*call, "--out", whole)
    with signalled(12, signal.SIGINT):
        assert command(*call, "--out", parts).exit_code == 130
    recipe = yaml.safe_load((parts / "recipe.yaml").read_text())
    recipe["training"] = {name: value for name, value in recipe["training"].items() if name not in then}
    del recipe["config"]["max_rank"]  # the method's own default is another one than this run's
    del recipe["loss"]  # it computed all tokens
    (parts / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    succeeded("train", "--out", parts, "--resume")
    assert (parts / "adapter.safetensors").read_bytes() == (whole / "adapter.safetensors").read_bytes()


def test_a_language_model_of_an_earlier_version_gets_no_other_defaults(tmp_path: Path) -> None:
    """But its evaluations. Else a run that is resumed has what its recipe says, and today's where that is silent."""
    for task in ("causal-lm", "preference", "seq2seq"):
        recipe = Recipe(task=task, data="data.csv", out=str(tmp_path), precision="fp32", training={"max_steps": 3})
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"version": 1, **to_mapping(recipe)}))
        assert settled(recipe, RunFolder(tmp_path), resume=True).training == {"max_steps": 3, "eval_strategy": "epoch"}


def test_a_run_of_an_earlier_version_is_resumed_by_the_recipe_that_began_it(tmp_path: Path) -> None:
    """Its folder holds the defaults of then, such as an evaluation in each epoch; and its rows are those of then."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "add", "input": "1 2", "output": "3"}')
    out, asked = tmp_path / "out", Recipe(task="seq2seq", data=str(rows), method="lora", precision="fp32")
    asked = attrs.evolve(asked, out=str(out))
    folder = RunFolder(out)
    folder.begin(attrs.evolve(asked, training={"eval_strategy": "epoch"}), resume=False)
    resuming.check(folder, asked, resume=True, overwrite=False)
    for size in ({}, {"per_device_eval_batch_size": 32}, {"per_device_eval_batch_size": 64}):
        pairs = attrs.evolve(asked, task="embedding", training={"per_device_train_batch_size": 8})
        folder.begin(attrs.evolve(pairs, training={**pairs.training, **size}), resume=False)
        resuming.check(folder, pairs, resume=True, overwrite=False)
        assert {"per_device_eval_batch_size": 32, **size}.items() <= settled(
            pairs, folder, resume=True
        ).training.items()
    folder.begin(attrs.evolve(asked, training={"eval_strategy": "epoch"}), resume=False)
    assert settled(asked, folder, resume=True).columns == {"source": "input"}
    folder.begin(attrs.evolve(asked, samples=2), resume=False)
    assert settled(asked, folder, resume=True).columns == {}


def test_a_run_is_resumed_with_options_that_say_the_same(arguments: list[str], tmp_path: Path) -> None:
    """Law: an option may be left out on resuming if its value is the default, and only then."""
    out, rate = tmp_path / "out", arguments.index("--lr")
    call = [*arguments, "--set", "warmup_steps=0.1"]
    with signalled(2, signal.SIGINT):
        assert command(*call, "--out", out).exit_code == 130
    other = command(*arguments[:rate], *arguments[rate + 2 :], "--out", out, "--resume")
    assert other.exit_code == 2
    assert "--resume: training.learning_rate was 0.01 and is not set now" in other.stderr
    succeeded(*arguments, "--out", out, "--resume")


def test_a_setting_that_is_changed_in_the_recipe_of_a_run_is_not_overridden(
    arguments: list[str], tmp_path: Path
) -> None:
    """Only where it is silent do the checkpoint's settings count: a change of the recipe in the folder is refused."""
    out = tmp_path / "out"
    with signalled(12, signal.SIGINT):
        assert command(*arguments, "--out", out).exit_code == 130
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    recipe["config"]["max_rank"] = 2
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    refused = command("train", "--out", out, "--resume")
    assert refused.exit_code == 2
    assert "max_rank" in refused.stderr


def test_a_run_that_an_earlier_version_began_keeps_its_rows(arguments: list[str], tmp_path: Path) -> None:
    """It held out a fifth of all rows. Those of a fifth of each class may have been trained by now."""
    out = tmp_path / "out"
    with signalled(2, signal.SIGINT):
        assert command(*arguments, "--out", out).exit_code == 130
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    del recipe["precision"]  # no earlier version wrote it
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with signalled(6, signal.SIGINT):
        assert command("train", "--out", out, "--resume").exit_code == 130
    succeeded("train", "--out", out, "--resume")
    assert record_of(out)["data"]["eval"] == f"a fifth of {recipe['data']}"


def test_an_ended_run_is_used_in_fp32_where_its_precision_cannot_be_had(out: Path, tmp_path: Path) -> None:
    """A run in fp16 was trained on a GPU, and its adapter is as good on a CPU; records of earlier versions say less."""
    moved = shutil.copytree(out, tmp_path / "moved")
    record = record_of(out)
    plain = using.predict_rows(out, ["good film"], base=None, batch_size=1)
    for change in ({"precision": "fp16"}, {"precision": None, "recipe": {"training": {"fp16": True}}}):
        changed = {name: value for name, value in {**record, **change}.items() if value is not None}
        (moved / "run.json").write_text(json.dumps(changed))
        done = succeeded("predict", moved, "--text", "good film")
        assert [json.loads(line) for line in done.stdout.splitlines()] == plain
        assert "was trained in fp16, and fp16 needs an accelerator, and there is none" in done.stderr
    (moved / "run.json").write_text(json.dumps({**record, "precision": "int8"}))
    refused = command("predict", moved, "--text", "good film")
    assert (refused.exit_code, "precision: expected fp32, bf16 or fp16, got 'int8'" in refused.stderr) == (2, True)


def test_the_logs_hold_every_loss_and_the_evaluations_that_were_asked_for(out: Path) -> None:
    """A loss for each step, since there are few; the held-out rows are evaluated once at the end by default."""
    logs = record_of(out)["logs"]
    assert [entry["step"] for entry in logs if "loss" in entry] == [*range(1, 25)]
    assert not any("eval_accuracy" in entry for entry in logs)
    task = task_of("text-classification")
    for asked in ({"eval_strategy": "epoch"}, {"metric_for_best_model": "accuracy"}):
        assert asked_of(Recipe(data="data.csv", training=asked), task)["eval_strategy"] == "epoch"


def test_what_a_run_is_measured_on_does_not_depend_on_how_it_trains(folder: Path) -> None:
    """Compared runs may differ in seeds and epochs, but not in their held-out rows."""
    assert data_of(folder) == data_of(folder, seed=1) == data_of(folder, num_train_epochs=9, learning_rate=1.0)


def test_a_pipeline_takes_what_a_folder_gives(out: Path) -> None:
    """`tunerkit.from_folder` returns a model and a tokenizer that transformers' pipeline classifies with."""
    model, tokenizer = tunerkit.from_folder(out)
    (answer,) = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)("A wonderful film.")
    assert set(answer) == {"label", "score"}


def test_another_process_loads_the_same_model(out: Path, tmp_path: Path) -> None:
    """`tunerkit.from_folder` gives the same logits, bit for bit."""
    texts = ["good film", "bad plot very not a the"]
    assert in_process(write_logits, out, texts, tmp_path / "logits.pt") == 0
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(out, texts))


def write_logits(out: Path, texts: list[str], path: Path) -> None:
    torch.set_num_threads(1)
    with registered(GrowingPlugin()):
        torch.save(logits(out, texts), path)


def test_loading_a_folder_leaves_the_process_as_it_was(out: Path) -> None:
    """No random numbers of the caller's are drawn, and transformers is as talkative as before."""
    before, level = torch.get_rng_state(), transformers.logging.get_verbosity()
    try:
        transformers.logging.set_verbosity_info()
        tunerkit.from_folder(out)
        assert transformers.logging.get_verbosity() != level
    finally:
        transformers.logging.set_verbosity(level)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_base_that_moved_is_named_and_given_again(out: Path, folder: Path, tmp_path: Path) -> None:
    """Without its base a folder says where it was; ``base`` says where it is."""
    record = record_of(out)
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in out.iterdir():
        if file.is_file():
            (moved / file.name).write_bytes(file.read_bytes())
    record["model"]["source"] = str(tmp_path / "gone")
    (moved / "run.json").write_text(json.dumps(record))
    with pytest.raises(tunerkit.errors.FileError, match=r"gone; pass the folder where it is now"):
        tunerkit.from_folder(moved)
    model, _ = tunerkit.from_folder(moved, base=folder / "tiny")
    assert tunerkit.tuner(model).ranks() == record["ranks"]
    done = command("predict", moved, "--text", "good film")
    assert done.exit_code == 2
    assert "--base" in done.stderr
    assert succeeded("predict", moved, "--base", folder / "tiny", "--text", "good film").output


# --- the commands that use a folder ---


def test_eval_finds_what_the_record_says(out: Path, folder: Path, tmp_path: Path) -> None:
    """On the same rows the metrics are the same."""
    lines = [f"{row['text']},{row['label']}\n" for row in data_of(folder).held_out]
    (tmp_path / "held_out.csv").write_text("text,label\n" + "".join(lines))
    before = sorted(out.rglob("*"))
    found = json.loads(succeeded("eval", out, "--data", tmp_path / "held_out.csv").output)
    assert found == {"rows": 8, **{name: pytest.approx(value) for name, value in record_of(out)["metrics"].items()}}
    assert sorted(out.rglob("*")) == before


def test_predictions_of_texts_a_file_and_the_merged_model_agree(out: Path, folder: Path, tmp_path: Path) -> None:
    """By ``--text``, by ``--data`` without labels, into a file, and by transformers alone after ``merge``."""
    texts = ["good film", "bad plot very not a the", "the very film"]
    asked = [word for text in texts for word in ("--text", text)]
    answers = [json.loads(line) for line in succeeded("predict", out, *asked).output.splitlines()]
    assert [answer["label"] for answer in answers] == [("bad", "good")[n] for n in logits(out, texts).argmax(-1)]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    succeeded("predict", out, "--data", tmp_path / "new.jsonl", "--out", tmp_path / "answers.jsonl")
    assert [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()] == answers
    assert command("predict", out, *asked, "--out", tmp_path / "answers.jsonl").exit_code == 2  # never overwritten
    succeeded("merge", out, "--out", tmp_path / "merged")
    classify = transformers.pipeline("text-classification", model=str(tmp_path / "merged"))
    merged = classify(texts)
    assert [answer["label"] for answer in merged] == [answer["label"] for answer in answers]
    assert [answer["score"] for answer in merged] == pytest.approx([answer["score"] for answer in answers], abs=1e-5)
    assert command("merge", out, "--out", tmp_path / "merged").exit_code == 2  # it is not empty any more


def test_a_prediction_has_its_row_and_the_probability_of_each_class(out: Path, folder: Path, tmp_path: Path) -> None:
    """Rows count from 1 in their file; the probabilities are the model's, and of several files each row names its."""
    texts = ["good film", "bad plot very not a the", "the very film"]
    for name, some in (("one.csv", texts[:2]), ("two.csv", texts[2:])):
        (tmp_path / name).write_text("text\n" + "".join(f"{text}\n" for text in some))
    asked = [word for text in texts for word in ("--text", text)]
    answers = [json.loads(line) for line in succeeded("predict", out, *asked).output.splitlines()]
    wanted = logits(out, texts).softmax(-1)
    for number, (answer, row) in enumerate(zip(answers, wanted, strict=True), start=1):
        assert list(answer) == ["row", "label", "score", "scores"]
        assert answer["row"] == number
        assert list(answer["scores"]) == ["bad", "good"]
        assert [*answer["scores"].values()] == pytest.approx(row.tolist(), abs=1e-5)
        assert answer["scores"][answer["label"]] == answer["score"] == max(answer["scores"].values())
    files = ["--data", tmp_path / "one.csv", "--data", tmp_path / "two.csv"]
    both = [json.loads(line) for line in succeeded("predict", out, *files).output.splitlines()]
    assert [(answer.pop("file"), answer.pop("row")) for answer in both] == [
        (str(tmp_path / "one.csv"), 1),
        (str(tmp_path / "one.csv"), 2),
        (str(tmp_path / "two.csv"), 1),
    ]
    for answer, alone in zip(both, answers, strict=True):
        assert answer["label"] == alone["label"]
        assert answer["scores"] == pytest.approx(alone["scores"], abs=1e-5)


@pytest.mark.parametrize(("ending", "delimiter"), [("csv", ","), ("TSV", "\t")])
def test_predictions_are_written_in_the_format_of_the_files_ending(
    ending: str, delimiter: str, out: Path, tmp_path: Path
) -> None:
    """A table has a column for each class's probability and is read back as data; other endings are refused first."""
    asked = ["--text", "good film", "--text", "the, very"]
    answers = [json.loads(line) for line in succeeded("predict", out, *asked).output.splitlines()]
    file = tmp_path / f"answers.{ending}"
    succeeded("predict", out, *asked, "--out", file)
    assert file.read_text().splitlines()[0] == delimiter.join(["row", "label", "score", "scores.bad", "scores.good"])
    rows = read_table(file).rows
    assert [(row["row"], row["label"]) for row in rows] == [(str(each["row"]), each["label"]) for each in answers]
    for row, answer in zip(rows, answers, strict=True):
        assert [float(str(row[f"scores.{name}"])) for name in ("bad", "good")] == [*answer["scores"].values()]
    done = command("predict", tmp_path, *asked, "--out", tmp_path / "answers.json")
    assert done.exit_code == 2
    assert "files that end in .jsonl, .csv, .tsv; rename it" in done.stderr


def test_predicted_lists_are_json_in_a_table(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in data files: an empty list too."""
    answers = [{"row": 1, "labels": ["a", "b"]}, {"row": 2, "labels": []}]
    monkeypatch.setattr(using, "predict_rows", lambda *_, **__: answers)
    succeeded("predict", out, "--text", "good", "--out", tmp_path / "a.csv")
    assert [json.loads(str(row["labels"])) for row in read_table(tmp_path / "a.csv").rows] == [["a", "b"], []]


def test_images_are_predicted_from_a_flat_folder_too(tmp_path: Path) -> None:
    """Each prediction names its file; a hidden folder is no class, which is said, and in no prediction."""
    image = pytest.importorskip("PIL.Image")
    save_tiny_vit(tmp_path / "vit")
    for number in range(6):
        for name, color in (("red", (200, number, 0)), ("blue", (0, number, 200)), (".ipynb_checkpoints", (0, 0, 0))):
            (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
            image.new("RGB", (SIDE, SIDE), color).save(tmp_path / "images" / name / f"{number}.png")
    (tmp_path / "flat").mkdir()
    for number in range(2):
        shutil.copy(tmp_path / "images" / "red" / f"{number}.png", tmp_path / "flat")
    arguments = ["train", "--method", "toy-low-rank", "--config", "{rank: 2}", "--epochs", "1"]
    done = succeeded(*arguments, "--model", tmp_path / "vit", "--data", tmp_path / "images", "--out", tmp_path / "out")
    assert f"note: {tmp_path / 'images'}: left out the hidden folders '.ipynb_checkpoints'\n" in done.output
    assert record_of(tmp_path / "out")["labels"] == ["blue", "red"]
    for name, files in (("flat", ["0.png", "1.png"]), ("images/red", [f"{number}.png" for number in range(6)])):
        done = succeeded("predict", tmp_path / "out", "--data", tmp_path / name)
        answers = [json.loads(line) for line in done.output.splitlines()]
        assert [answer["image"] for answer in answers] == [str(tmp_path / name / file) for file in files]
        assert [answer["row"] for answer in answers] == [*range(1, len(files) + 1)]
        assert all(sum(answer["scores"].values()) == pytest.approx(1) for answer in answers)
    done = succeeded("predict", tmp_path / "out", "--data", tmp_path / "images")
    assert len(done.stdout.splitlines()) == 12
    assert ".ipynb_checkpoints" not in done.stdout
    assert "left out the hidden folders" in done.stderr


def test_labels_are_evaluated_as_they_are_trained(out: Path, tmp_path: Path) -> None:
    """With white space around them too, which is said on stderr, so the metrics stay JSON."""
    for name, space in (("tidy", ""), ("spaced", " ")):
        (tmp_path / f"{name}.csv").write_text(f"text,label\ngood film,{space}good\nbad plot,bad{space}\n")
    tidy, spaced = (command("eval", out, "--data", tmp_path / f"{name}.csv") for name in ("tidy", "spaced"))
    assert json.loads(tidy.stdout) == json.loads(spaced.stdout)
    assert tidy.stderr == ""
    assert "note: labels are read without white space around them" in spaced.stderr


def test_several_files_are_evaluated_together(out: Path, folder: Path, tmp_path: Path) -> None:
    """As one file with the rows of all."""
    header, *lines = (folder / "data.csv").read_text().splitlines(keepends=True)
    for name, some in (("one", lines[:10]), ("two", lines[10:])):
        (tmp_path / f"{name}.csv").write_text("".join([header, *some]))
    whole = json.loads(succeeded("eval", out, "--data", folder / "data.csv").stdout)
    files = ["--data", tmp_path / "one.csv", "--data", tmp_path / "two.csv"]
    assert json.loads(succeeded("eval", out, *files).stdout) == pytest.approx(whole)


def test_rows_to_predict_may_have_any_labels(out: Path, tmp_path: Path) -> None:
    """They are not read."""
    (tmp_path / "labelled.csv").write_text("text,label\ngood film,\nbad plot,ugly\n")
    (tmp_path / "bare.csv").write_text("text\ngood film\nbad plot\n")
    labelled, bare = (
        using.predict_rows(out, [tmp_path / name], base=None, batch_size=2) for name in ("labelled.csv", "bare.csv")
    )
    assert labelled == bare


def test_predictions_are_made_on_the_accelerator_and_merges_are_not(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge needs the base's weights alone, which may not fit it twice."""
    monkeypatch.setattr(using.hardware, "choose_device", lambda: torch.device("meta"))
    monkeypatch.setattr(
        TextClassification, "predict", lambda self, loaded, rows, **_: [{"device": loaded.model.device.type}]
    )
    assert using.predict_rows(out, ["good"], base=None, batch_size=1) == [{"row": 1, "device": "meta"}]
    succeeded("merge", out, "--out", tmp_path / "merged")


@pytest.mark.parametrize("empty", [True, False])
def test_a_merge_leaves_a_whole_model_or_nothing(
    empty: bool, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C may come while the weights are written; the folder may be there already, if it is empty."""
    merged = tmp_path / "merged"
    if empty:
        merged.mkdir()

    def interrupted(model: object, path: Path) -> None:
        (path / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "save_pretrained", interrupted)
        assert command("merge", out, "--out", merged).exit_code == 130
    assert [*tmp_path.rglob("*")] == ([merged] if empty else [])
    succeeded("merge", out, "--out", merged)
    assert [*tmp_path.iterdir()] == [merged]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {file.name for file in merged.iterdir()}
    assert not transformers.AutoModel.from_pretrained(merged).training


def test_a_merge_is_refused_before_the_model_is_loaded(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading may take minutes."""
    monkeypatch.setattr(using, "load_run", None)
    (tmp_path / "file").touch()
    done = command("merge", out, "--out", tmp_path / "file" / "merged")
    assert done.exit_code == 2
    assert "cannot write to this folder" in done.stderr


def test_names_are_shown_as_they_are(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Square brackets in a label or an error are no markup for the terminal."""
    shutil.copytree(out, tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(json.dumps({**record_of(out), "labels": ["[red]", "[/x]"]}))
    assert "[red], [/x]" in succeeded("show", tmp_path / "run").output
    broken = {"acme": MethodInfo("acme-plugin", "3.1", "[/x]")}
    monkeypatch.setattr(tunerkit, "methods", lambda: broken)
    assert "[/x]" in succeeded("methods").output


def test_show_names_what_the_folder_holds(out: Path, folder: Path) -> None:
    """Method, base, labels, metrics, config and training."""
    shown = succeeded("show", out).output
    record = record_of(out)
    for part in ("toy-growing", str(folder / "tiny"), "bad, good", f"accuracy {record['metrics']['accuracy']:.4f}"):
        assert part in " ".join(shown.split()) or part in shown.replace("\n", "")
    assert "max_rank: 3" in shown
    assert "num_train_epochs=3" in shown
    assert command("show", folder / "tiny").exit_code == 2


def test_a_classifier_cannot_talk(out: Path) -> None:
    """``chat`` is for language models, and says what to call instead."""
    done = command("chat", out)
    assert done.exit_code == 2
    assert f"tunerkit predict {out}" in done.stderr


def test_a_language_model_is_trained_on_conversations_resumed_and_talks(tmp_path: Path) -> None:
    """TRL's trainer resumes bit for bit too; ``chat`` answers each line as the model does, until an empty one."""
    pytest.importorskip("trl", reason="the task causal-lm needs the extra [lm]")
    save_tiny_llama(tmp_path / "llama")
    turns = [("the film", "very good"), ("a plot", "not bad")] * 20
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        for asked, answer in turns
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        *("train", "--method", "toy-low-rank", "--config", "{rank: 4}", "--lr", "0.05", "--epochs", "3"),
        *("--model", str(tmp_path / "llama"), "--data", str(tmp_path / "chat.jsonl"), "--batch-size", "8"),
    ]
    out = tmp_path / "out"
    succeeded(*arguments, "--out", out)
    check_resumed_after_ctrl_c(arguments, out, tmp_path / "parts", at=(6,))
    talk = succeeded("chat", out, "--new-tokens", "4", typed="the film\na plot\n\n").output
    model, tokenizer = tunerkit.from_folder(out)
    asked = [{"role": "user", "content": "the film"}]
    inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    given = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert talk.startswith(f"you: the film\n{tokenizer.decode(given, skip_special_tokens=True)}\nyou: a plot\n")
    record = record_of(out)
    assert [entry["eval_loss"] for entry in record["logs"] if "eval_loss" in entry] == [record["metrics"]["loss"]]
    assert [{*sample} for sample in record["samples"]] == [{"prompt", "after"}] * 2
    assert record["conversations"] is True
    asked_once = succeeded("predict", out, "--text", "the film", "--new-tokens", "4").output
    answer = tokenizer.decode(given, skip_special_tokens=True)
    assert json.loads(asked_once) == {"completion": answer}
    # Without a template, if texts were trained; as an earlier version did, if the record does not say.
    for changed, wanted in (({"conversations": False}, continued(out, "the film", 4)), ({}, answer)):
        rest = {name: value for name, value in record.items() if name != "conversations"}
        (out / "run.json").write_text(json.dumps({**rest, **changed}))
        talk = succeeded("chat", out, "--new-tokens", "4", typed="the film\n").output  # and Ctrl-D
        assert talk.startswith(f"you: the film\n{wanted}\n")
        told = json.loads(succeeded("predict", out, "--text", "the film", "--new-tokens", "4").output)
        assert told == {"completion": continued(out, "the film", 4)}


def continued(out: Path, text: str, new_tokens: int) -> str:
    """What a language model writes after a text."""
    model, tokenizer = tunerkit.from_folder(out)
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    found = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(found, skip_special_tokens=True))


def test_preferences_are_evaluated_by_the_runs_own_loss(tmp_path: Path) -> None:
    """With another beta than the trainer's default, ``eval`` finds what the record says."""
    pytest.importorskip("trl", reason="the task preference needs the extra [lm]")
    save_tiny_llama(tmp_path / "llama")
    rows = [{"prompt": f"the {word} ", "chosen": "good", "rejected": "bad"} for word in ("film", "plot", "a") * 4]
    for name, some in (("train", rows), ("eval", rows[:4])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    arguments = ["train", "--method", "toy-low-rank", "--config", "{rank: 4}", "--lr", "0.05", "--epochs", "2"]
    files = ["--data", tmp_path / "train.jsonl", "--eval-data", tmp_path / "eval.jsonl", "--out", tmp_path / "out"]
    given = ["beta=2", "loss_type=[ipo]", "save_strategy=epoch", "load_best_model_at_end=true", "eval_strategy=epoch"]
    settings = [word for each in given for word in ("--set", each)]
    succeeded(*arguments, *files, "--model", tmp_path / "llama", "--batch-size", "4", *settings)
    found = json.loads(succeeded("eval", tmp_path / "out", "--data", tmp_path / "eval.jsonl").output)
    metrics = record_of(tmp_path / "out")["metrics"]
    assert found == {"rows": 4, **{name: pytest.approx(value, rel=1e-4) for name, value in metrics.items()}}


def test_new_tokens_are_for_tasks_that_write(out: Path) -> None:
    """A classifier writes none."""
    done = command("predict", out, "--text", "good", "--new-tokens", "3")
    assert done.exit_code == 2
    assert "--new-tokens: text-classification generates no text" in done.stderr


# --- the output folder ---


def test_a_base_in_another_dtype_is_loaded_so_again(arguments: list[str], tmp_path: Path) -> None:
    """Half of the memory, with adapters in fp32; the record says it, and loading follows the record."""
    out = tmp_path / "out"
    succeeded(*arguments, "--out", out, "--epochs", "1", "--set", "dtype=bfloat16")
    assert record_of(out)["model"]["dtype"] == "bfloat16"
    model, _ = tunerkit.from_folder(out)
    assert model.dtype == torch.bfloat16
    adapters = tunerkit.tuner(model).adapters().values()
    assert {p.dtype for adapter in adapters for p in adapter.parameters()} == {torch.float32}


@pytest.mark.parametrize("setting", ["hub_token=hf_secret", "push_to_hub=true", "hub_model_id=me/mine"])
def test_uploading_is_left_to_another_command(setting: str, arguments: list[str], tmp_path: Path) -> None:
    """So no recipe has a token, which would stand in every file that is shared."""
    done = command(*arguments, "--out", tmp_path / "out", "--set", setting)
    assert done.exit_code == 2
    assert "hf upload NAME OUT" in done.stderr
    assert ("hf auth login" in done.stderr) == ("token" in setting)
    assert "secret" not in done.output
    assert not (tmp_path / "out").exists()


def test_a_folder_with_a_recipe_alone_is_no_run(arguments: list[str], tmp_path: Path) -> None:
    """It is somebody's own, and neither it nor what lies beside it is overwritten."""
    (tmp_path / "recipe.yaml").write_text("version: 1\n")
    done = command(*arguments, "--out", tmp_path, "--overwrite")
    assert done.exit_code == 2
    assert "the folder holds other files, such as recipe.yaml" in done.stderr


def test_the_adapter_is_kept_if_what_follows_the_training_fails(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Describing a run may fail, but must not cost it."""

    def fail(*_: object) -> None:
        raise tunerkit.errors.StepError("no")

    monkeypatch.setattr(running, "record_of", fail)
    assert command(*arguments, "--out", tmp_path / "out", "--set", "max_steps=1").exit_code == 2
    assert {"adapter.safetensors", "tokenizer.json"} <= {file.name for file in (tmp_path / "out").iterdir()}
    assert not (tmp_path / "out" / "run.json").exists()


def test_an_evaluation_that_fails_costs_no_adapter(
    arguments: list[str], folder: Path, out: Path, tmp_path: Path
) -> None:
    """In the middle of the training and after it. The run has ended, and can be used and evaluated."""
    new = tmp_path / "out"
    done = command(*arguments, "--out", new, "--set", "eval_do_concat_batches=false")
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert f"the adapter is trained and written to {new}, but it could not be evaluated: " in done.stderr
    assert f"to evaluate it: tunerkit eval {new} --data FILE" in done.stderr
    assert (new / "adapter.safetensors").read_bytes() == (out / "adapter.safetensors").read_bytes()
    record = record_of(new)
    assert record["metrics"] == {}
    assert (new / "report.html").is_file()
    for use in (("predict", "--text", "good film"), ("eval", "--data", folder / "data.csv")):
        found, wanted = (succeeded(use[0], each, *use[1:]).output for each in (new, out))
        assert found == wanted
    assert "this run has ended" in command("train", "--out", new, "--resume").stderr
    # Others with which no metric can be computed: `eval` leaves them out.
    record["recipe"]["training"] |= {"prediction_loss_only": True, "label_names": ["foo"]}
    (new / "run.json").write_text(json.dumps(record))
    assert succeeded("eval", new, "--data", folder / "data.csv").output == wanted


def test_a_training_that_needs_a_failing_evaluation_keeps_its_adapter(arguments: list[str], tmp_path: Path) -> None:
    """The best checkpoint cannot be chosen, so it stops there, and says where the adapter is."""
    best = ["--set", "load_best_model_at_end=true", "--set", "metric_for_best_model=f1", "--set", "save_strategy=epoch"]
    done = command(*arguments, "--out", tmp_path / "out", *best, "--set", "eval_do_concat_batches=false")
    assert done.exit_code == 2
    assert "the evaluation after step 8 of 24 failed: " in done.stderr
    assert f"The adapter as it is now is in {tmp_path / 'out'}, for tunerkit.load" in done.stderr
    assert (tmp_path / "out" / "adapter.safetensors").is_file()


def test_the_home_folder_may_be_written_as_a_tilde(
    folder: Path, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a recipe and after an equals sign no shell replaces it. What is published does not name it otherwise."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(folder)
    shutil.copytree(folder / "tiny", tmp_path / "tiny")
    shutil.copy(folder / "data.csv", tmp_path / "data.csv")
    paths = {name: f"~/{path}" for name, path in (("model", "tiny"), ("data", "data.csv"), ("out", "out"))}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**paths, "eval_data": "~/data.csv", "method": "toy-low-rank"}))
    with signalled(1, signal.SIGINT):
        done = command("train", tmp_path / "r.yaml", "--set", "max_steps=2")
    assert done.exit_code == 130
    assert done.stderr.endswith(f"--out {tmp_path / 'out'} --resume\n")
    succeeded("train", "--out=~/out", "--resume")
    assert record_of(tmp_path / "out")["model"]["source"] == "~/tiny"
    assert not (folder / "~").exists()
    for name in ("run.json", "recipe.yaml", "data.sha256", "report.html"):
        assert str(tmp_path) not in (tmp_path / "out" / name).read_text(), name
    monkeypatch.chdir(tmp_path)
    assert tunerkit.from_folder("~/out")[0].name_or_path == str(tmp_path / "tiny")


def test_a_checkpoint_for_the_same_classes_keeps_its_order(folder: Path, tmp_path: Path) -> None:
    """Its head is trained for it; the record, the predictions and the loaded model have that order too."""
    shutil.copytree(folder / "tiny", tmp_path / "tiny")
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    names = {"id2label": {"0": "good", "1": "bad"}, "label2id": {"good": 0, "bad": 1}}
    (tmp_path / "tiny" / "config.json").write_text(json.dumps({**config, **names}))
    arguments = arguments_of(folder, "toy-low-rank", "{rank: 2}")
    succeeded(*arguments, "--model", tmp_path / "tiny", "--out", tmp_path / "out")
    record = record_of(tmp_path / "out")
    assert record["labels"] == ["good", "bad"]
    held_out = data_of(folder).held_out
    predicted = logits(tmp_path / "out", [row["text"] for row in held_out]).argmax(-1).tolist()
    truth = [record["labels"].index(row["label"]) for row in held_out]
    assert record["metrics"]["accuracy"] == sum(map(int.__eq__, predicted, truth)) / 8
    pairs = [*zip(truth, predicted, strict=True)]
    assert record["confusion"] == [[pairs.count((row, column)) for column in (0, 1)] for row in (0, 1)]
    texts = [word for row in held_out for word in ("--text", row["text"])]
    answers = [json.loads(line) for line in succeeded("predict", tmp_path / "out", *texts).output.splitlines()]
    assert [record["labels"].index(answer["label"]) for answer in answers] == predicted
    # A folder of an earlier version has the labels in another order, for which its head was trained.
    (tmp_path / "out" / "run.json").write_text(json.dumps({**record, "labels": ["bad", "good"]}))
    assert tunerkit.from_folder(tmp_path / "out")[0].config.id2label == {0: "bad", 1: "good"}


def test_any_metric_may_choose_the_best_checkpoint(arguments: list[str], tmp_path: Path) -> None:
    """What is evaluated is logged too, so the trainer finds it; checkpoints are then as often as evaluations."""
    best = ["load_best_model_at_end=true", "metric_for_best_model=f1"]
    done = succeeded(*arguments, "--out", tmp_path / "out", *(word for each in best for word in ("--set", each)))
    logs = record_of(tmp_path / "out")["logs"]
    scores = [entry["eval_f1"] for entry in logs if "eval_f1" in entry]
    assert len(scores) == 3
    assert record_of(tmp_path / "out")["metrics"]["f1"] == pytest.approx(max(scores))
    progress = [line for line in done.output.splitlines() if ": step " in line]
    assert any("accuracy" in line for line in progress)
    assert not any("f1" in line for line in progress)


def test_data_that_changed_is_not_resumed(arguments: list[str], folder: Path, tmp_path: Path) -> None:
    """Other rows would end in other weights; the same bytes elsewhere in time are the same data."""
    recipe = Recipe(method="lora", data=str(tmp_path / "data.csv"), out=str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    shutil.copy(folder / "data.csv", tmp_path / "data.csv")
    RunFolder(tmp_path / "out").begin(recipe, resume=False)
    resuming.check(RunFolder(tmp_path / "out"), recipe, resume=True, overwrite=False)
    with (tmp_path / "data.csv").open("a") as file:
        file.write("one more,good\n")
    with pytest.raises(OutputError, match=r"data.csv has changed since the run began"):
        resuming.check(RunFolder(tmp_path / "out"), recipe, resume=True, overwrite=False)
    (tmp_path / "out" / DIGESTS).unlink()  # an earlier version wrote none
    resuming.check(RunFolder(tmp_path / "out"), recipe, resume=True, overwrite=False)


def test_a_run_reads_several_files(arguments: list[str], folder: Path, tmp_path: Path) -> None:
    """All of them are in the record, the recipe and the digests, and resuming wants the same ones, unchanged."""
    shutil.copy(folder / "data.csv", tmp_path / "more.csv")
    held = ["--eval-data", folder / "data.csv", "--eval-data", tmp_path / "more.csv"]
    call = [*arguments, "--data", tmp_path / "more.csv", *held, "--out", tmp_path / "out", "--set", "max_steps=2"]
    with signalled(1, signal.SIGINT):
        assert command(*call).exit_code == 130
    paths = [str(folder / "data.csv"), str(tmp_path / "more.csv")]
    kept = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert (kept["data"], kept["eval_data"]) == (paths, paths)
    digests = [line.split("  ") for line in (tmp_path / "out" / DIGESTS).read_text().splitlines()]
    assert [path for _, path in digests] == paths
    assert len({digest for digest, _ in digests}) == 1
    with (tmp_path / "more.csv").open("r+") as file:
        file.write("Text")
    done = command(*call, "--resume")
    assert done.exit_code == 2
    assert "more.csv has changed since the run began" in done.stderr
    shutil.copy(folder / "data.csv", tmp_path / "more.csv")
    assert "data was" in command(*arguments, *held, *call[-4:], "--resume").stderr
    succeeded(*call, "--resume")
    record = record_of(tmp_path / "out")
    assert record["rows"] == {"train": 80, "eval": 80}
    assert record["data"] == {"train": " and ".join(paths), "eval": " and ".join(paths)}
    assert record["held_out"]["also_trained"] == 80


def test_second_texts_are_left_out_where_single_texts_were_trained(out: Path, tmp_path: Path) -> None:
    """A file may have more columns than the training data had."""
    (tmp_path / "pairs.csv").write_text("text,text_pair\nfilm good,film bad\nplot bad,a\n")
    (tmp_path / "texts.csv").write_text("text\nfilm good\nplot bad\n")
    pairs, texts = (
        using.predict_rows(out, [tmp_path / name], base=None, batch_size=2) for name in ("pairs.csv", "texts.csv")
    )
    assert pairs == texts


def test_a_dry_run_says_which_columns_are_left_out(arguments: list[str], tmp_path: Path) -> None:
    """And which one is taken for which of ours."""
    (tmp_path / "data.csv").write_text("id,sentence,label,date\n" + "1,good,a,x\n2,bad,b,y\n" * 6)
    arguments = [*arguments]
    arguments[arguments.index("--data") + 1] = str(tmp_path / "data.csv")
    shown = succeeded(*arguments, "--out", tmp_path / "new", "--dry-run").output
    assert "columns: text (sentence), label; left out: id, date\n" in shown


def test_a_dry_run_writes_nothing(
    arguments: list[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It prints rows, columns, lengths, steps and parameters, and creates no folder."""
    monkeypatch.chdir(tmp_path)
    shown = succeeded(*arguments, "--out", tmp_path / "new", "--dry-run").output
    assert "32 training rows" in shown
    assert "24 steps, 3 epochs, batches of 4" in shown
    lengths = [len(row["text"].split()) + 2 for row in data_of(folder).train]
    assert f"cut at 8 tokens, which {sum(length >= 8 for length in lengths)} rows reach" in shown
    assert "columns: text, label\n" in shown
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_refused_late_leaves_no_folder(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error after the trainer was built leaves nothing that was not there before."""

    def fail(*_: object) -> None:
        raise tunerkit.errors.StepError("no")

    monkeypatch.setattr(running.tunerkit, "attach", fail)
    assert command(*arguments, "--out", tmp_path / "deep" / "new").exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_an_ended_run_is_kept_unless_it_is_overwritten(arguments: list[str], folder: Path, tmp_path: Path) -> None:
    """Refused without a flag and with ``--resume``; ``--overwrite`` keeps it until there is a new adapter."""
    new = tmp_path / "new"
    short = [*arguments, "--out", new, "--set", "max_steps=1", "--method", "toy-low-rank", "--config", "{rank: 1}"]
    succeeded(*short)
    record = (new / "run.json").read_bytes()
    for flag, message in (([], "pass --overwrite to replace it"), (["--resume"], "this run has ended")):
        done = command(*short, *flag)
        assert done.exit_code == 2
        assert message in done.stderr
        assert (new / "run.json").read_bytes() == record
    (new / "checkpoints" / "checkpoint-99").mkdir()
    with signalled(1, signal.SIGINT, times=2):
        assert command(*short, "--overwrite").exit_code == 130
    # The earlier run is there, and none of its checkpoints: the interrupted one could be resumed from them.
    assert (new / "run.json").read_bytes() == record
    assert not (new / "checkpoints" / "checkpoint-99").exists()
    assert "holds a run that has not ended" in command(*short).stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    done = command(*arguments, "--out", tmp_path / "mine", "--overwrite")
    assert done.exit_code == 2
    assert "notes.txt" in done.stderr


def test_a_loss_that_is_not_finite_stops_the_command(arguments: list[str], tmp_path: Path) -> None:
    """One line names the step and its own rate, not the peak; there is no adapter, and the folder can be reused."""
    new = tmp_path / "new"
    done = command(*arguments, "--out", new, "--lr", "1e12", "--set", "warmup_steps=12")
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("tunerkit: ")
    assert done.stderr.count("\n") == 1
    assert "use a lower --lr" in done.stderr
    found = re.search(r"the loss is (?:nan|inf) at step (\d+) of 24 \(learning rate ([\d.e+]+)\)", done.stderr)
    assert found is not None, done.stderr
    step, rate = int(found[1]), float(found[2])
    assert step < 12
    assert rate == pytest.approx(1e12 * (step - 1) / 12, rel=0.01)
    assert not {"run.json", "adapter.safetensors"} & {file.name for file in new.iterdir()}
    assert "the training has not ended" in command("predict", new, "--text", "good").stderr
    succeeded(*arguments, "--out", new, "--overwrite", "--set", "max_steps=1")


def test_a_number_that_is_not_finite_is_left_out_of_the_record() -> None:
    """Standard JSON has no NaN: a gradient's norm may be infinite in a run that ends well."""
    record = {"logs": [{"loss": 1.0, "grad_norm": float("inf")}], "values": (float("nan"), 1), "steps": 3}
    assert running.finite(record) == {"logs": [{"loss": 1.0}], "values": [None, 1], "steps": 3}


# --- resuming ---


def test_after_ctrl_c_the_end_is_that_of_an_uninterrupted_run(arguments: list[str], out: Path, tmp_path: Path) -> None:
    """Before the first checkpoint, in the middle of an epoch, at the end of one, and in the last step."""
    check_resumed_after_ctrl_c(arguments, out, tmp_path / "parts", at=(1, 11, 16, 24))


def test_a_run_that_ends_inside_an_epoch_is_resumed_in_its_last_step(arguments: list[str], tmp_path: Path) -> None:
    """After Ctrl-C only the evaluation at the epoch's end is due, and the trainer's loop takes no further step."""
    short = [*arguments, "--set", "max_steps=11", "--set", "logging_steps=4"]  # no checkpoint is at a log entry
    succeeded(*short, "--out", tmp_path / "whole")
    check_resumed_after_ctrl_c(short, tmp_path / "whole", tmp_path / "parts", at=(3, 11))


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_a_run_that_stopped_after_its_last_step_takes_no_further_one(
    strategy: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint is that of the end; if it was written after the evaluation, it is not evaluated again."""
    short = [*arguments, "--set", "max_steps=11", "--set", f"save_strategy={strategy}"]
    succeeded(*short, "--out", tmp_path / "whole")

    def fail(*_: object) -> None:
        raise tunerkit.errors.StepError("no")

    with monkeypatch.context() as patch:
        patch.setattr(running.tunerkit, "save", fail)
        assert command(*short, "--out", tmp_path / "parts").exit_code == 2
    assert (tmp_path / "parts" / "checkpoints" / "checkpoint-11").exists()
    succeeded("train", "--out", tmp_path / "parts", "--resume")
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_after_kill_9_the_end_is_that_of_an_uninterrupted_run(arguments: list[str], out: Path, tmp_path: Path) -> None:
    """Before the first checkpoint, in the middle of an epoch, and near the end."""
    check_resumed_after_kill(arguments, PLUGINS, out, tmp_path / "parts", at=(1, 11, 23))


def test_a_checkpoint_that_is_not_whole_is_none(
    arguments: list[str], out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while writing the first checkpoint, a run begins again."""
    new = tmp_path / "new"
    with signalled(1, signal.SIGINT):
        assert command(*arguments, "--out", new).exit_code == 130
    (new / "checkpoints" / "checkpoint-1" / "trainer_state.json").unlink()
    (new / "checkpoints" / "checkpoint-1" / "optimizer.pt").unlink()
    with signalled(2, signal.SIGINT, times=2):
        done = command("train", "--out", new, "--resume")
    assert done.exit_code == 130, done.output
    assert done.stderr == "tunerkit: interrupted\n"  # at once, without a checkpoint to go on from


@pytest.mark.parametrize("kept", [{}, {"Resumable": {"args": {}, "attributes": {}}}])
def test_a_checkpoint_without_the_sum_of_the_losses_leaves_the_trainers_mean(kept: dict[str, Any]) -> None:
    """An earlier version kept none. A sum of the steps since, over all steps, would be a wrong mean."""
    trainer: Any = SimpleNamespace(
        _tr_loss=torch.zeros(()), _total_loss_scalar=0.0, _globalstep_last_logged=0, state=TrainerState(global_step=8)
    )
    trainer.state.stateful_callbacks = kept
    resumable = Resumable(trainer)
    resumable.on_train_begin(None, trainer.state, TrainerControl())
    logged: list[dict[str, float]] = []
    resumable.log(logged.append, {"train_loss": 0.7})
    assert logged == [{"train_loss": 0.7}]
    assert "Resumable" in trainer.state.stateful_callbacks


def test_a_run_is_resumed_from_any_folder_and_with_the_same_recipe_only(
    arguments: list[str], out: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths are kept in full; another value is refused by name; the folder may have been moved."""
    monkeypatch.chdir(folder)
    relative = [Path(each).name if each.startswith(str(folder)) else each for each in arguments]
    new = tmp_path / "new"
    with signalled(2, signal.SIGINT):
        assert command(*relative, "--out", new).exit_code == 130
    kept = yaml.safe_load((new / "recipe.yaml").read_text())
    assert kept["model"] == str(folder / "tiny")
    assert kept["data"] == str(folder / "data.csv")
    assert kept["out"] == str(new)
    assert kept["config"] == {"every": 6, "max_rank": 3}
    done = command(*relative, "--out", new, "--lr", "0.5", "--resume")
    assert done.exit_code == 2
    assert "training.learning_rate was 0.01 and is 0.5 now" in done.stderr
    assert command(*relative, "--out", new).exit_code == 2  # neither --resume nor --overwrite
    with signalled(4, signal.SIGINT):
        assert command(*relative, "--out", new, "--resume").exit_code == 130  # the same flags
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    done = command(*relative, "--out", new, "--resume")  # now the same names mean other files
    assert done.exit_code == 2
    assert "data was" in done.stderr
    with signalled(6, signal.SIGINT):
        assert command("train", new / "recipe.yaml", "--resume").exit_code == 130
    new.rename(tmp_path / "moved")
    with signalled(8, signal.SIGINT):
        assert command("train", "--out", tmp_path / "moved", "--resume").exit_code == 130
    assert not new.exists()
    assert {path.name for path in (tmp_path / "moved" / "checkpoints").iterdir()} >= {"checkpoint-8"}


def test_ctrl_c_while_the_baseline_runs_keeps_the_adapter(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run has ended by then: its folder can be used, and there is nothing to resume."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "compare", interrupted)
    new = tmp_path / "new"
    done = command(*arguments, "--out", new, "--baseline", "--set", "max_steps=2")
    assert done.exit_code == 130
    assert done.stderr == f"tunerkit: interrupted; the run in {new} has ended, and its adapter is complete\n"
    assert read_run(new).record["steps"] == 2
    assert (new / "report.html").is_file()
    assert succeeded("predict", new, "--text", "good film").output
    assert "this run has ended" in command("train", "--out", new, "--resume").stderr


def test_ctrl_c_in_any_command_exits_with_130(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, without a traceback."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(using, "predict_rows", interrupted)
    done = command("predict", out, "--text", "good film")
    assert done.exit_code == 130
    assert done.stderr == "tunerkit: interrupted\n"


# --- recipes ---


def test_a_recipe_gives_way_to_flags_and_flags_to_set(folder: Path, tmp_path: Path) -> None:
    """The folder's recipe has the values as run, with which it can be run again."""
    recipe = {
        "task": "text-classification",
        "model": str(folder / "tiny"),
        "data": str(folder / "data.csv"),
        "method": "toy-low-rank",
        "config": {"rank": 1},
        "training": {"learning_rate": 0.1, "num_train_epochs": 1, "seed": 5},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    new = tmp_path / "new"
    call = [
        "train",
        tmp_path / "r.yaml",
        "--lr",
        "0.02",
        "--batch-size",
        "8",
        "--set",
        "per_device_train_batch_size=16",
    ]
    succeeded(*call, "--set", "rank=3", "--out", new)
    kept = yaml.safe_load((new / "recipe.yaml").read_text())
    asked = {"learning_rate": 0.02, "num_train_epochs": 1, "seed": 5, "per_device_train_batch_size": 16}
    assert kept["training"] == {**task_of("text-classification").defaults, **asked}
    assert kept["config"] == {"rank": 3}
    record = record_of(new)
    assert record["recipe"] == kept
    assert record["steps"] == 2
    succeeded("train", new / "recipe.yaml", "--out", tmp_path / "again")
    assert (tmp_path / "again" / "adapter.safetensors").read_bytes() == (new / "adapter.safetensors").read_bytes()


def test_keys_of_plugins_are_kept(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a plugin's key was set to stands in the folder's recipe and in the record."""
    keys = {"acme": {"type": "object", "description": "Acme's options."}}
    monkeypatch.setattr(reading, "additions", lambda: (Addition("acme", recipe_keys=keys),))
    new = tmp_path / "new"
    succeeded(*arguments, "--out", new, "--set", "acme.level=3", "--set", "max_steps=1")
    assert yaml.safe_load((new / "recipe.yaml").read_text())["acme"] == {"level": 3}
    assert record_of(new)["recipe"]["acme"] == {"level": 3}


def test_tensorboard_logs_into_the_output_folder(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless its environment variable names another folder."""
    pytest.importorskip("tensorboard", reason="the logs are read by it")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    succeeded(*arguments, "--out", "new", "--set", "report_to=tensorboard", "--set", "max_steps=2")
    assert [file.name.split(".")[0] for file in (tmp_path / "new" / "logs").iterdir()] == ["events"]
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "mine"))
    succeeded(*arguments, "--out", "other", "--set", "report_to=tensorboard", "--set", "max_steps=1")
    assert [file.name.split(".")[0] for file in (tmp_path / "mine").iterdir()] == ["events"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "new", "other"]


# --- runs that do not learn ---


def test_a_run_that_learns_nothing_says_so_everywhere(folder: Path, tmp_path: Path) -> None:
    """In the closing lines, in the record, on the report's first line, and in `show`: with what to try."""
    write_rows(tmp_path / "data.csv", 200)
    new = tmp_path / "new"
    options = ("--method", "toy-low-rank", "--model", folder / "tiny", "--data", tmp_path / "data.csv", "--out", new)
    done = succeeded("train", *options, "--lr", "1e-9", "--epochs", "1", "--batch-size", "8")
    assert "this run did not learn: the loss is 0.69" in done.stdout
    assert "guessing gives 0.693" in done.stdout
    kinds = [problem["kind"] for problem in record_of(new)["problems"]]
    assert kinds == ["no_learning", "one_class"], record_of(new)["problems"]
    advice = "as with --epochs; or --lr 0.001, and check that the labels fit the rows"
    assert "try more steps than these" in done.stdout
    assert advice in done.stdout
    assert advice in (new / "report.html").read_text(encoding="utf-8").partition("<h1>")[0]
    assert "this run did not learn" in succeeded("show", new).stdout
    assert json.loads(succeeded("show", new, "--json").stdout)["problems"] == record_of(new)["problems"]


def test_a_run_is_restarted_from_its_last_good_checkpoint_at_half_the_rate(folder: Path, tmp_path: Path) -> None:
    """It ends as one that did not collapse; record, report and the command's lines say what happened."""
    write_rows(tmp_path / "data.csv", 400)
    new = tmp_path / "new"
    options = ("--method", "toy-growing", "--model", folder / "tiny", "--data", tmp_path / "data.csv", "--out", new)
    settings = ("--lr", "0.01", "--epochs", "5", "--batch-size", "8", "--set", "on_collapse=restart")
    # With other values, the loss is not lost before the next checkpoint, or in another way.
    usual = ("warmup_steps=0.06", "adam_beta2=0.999", "max_grad_norm=1.0")
    with collapsing(101):
        done = succeeded("train", *options, *settings, *(word for each in usual for word in ("--set", each)))
    record = record_of(new)
    (restart,) = record["restarts"]
    assert restart["from_step"] == 100
    assert restart["learning_rate"] == 0.005
    assert 100 < restart["step"] <= 132
    assert "problems" not in record
    assert 'class="failure"' not in (new / "report.html").read_text(encoding="utf-8")
    said = f"restarted from step 100 at half the learning rate, 0.005, because {restart['text']}"
    assert done.stdout.count(said) == 2  # at once, and in the closing lines
    assert f"The run was {said}" in (new / "report.html").read_text(encoding="utf-8")
    shown = succeeded("show", new).stdout
    assert "restarted from step 100" in shown
    assert "did not learn" not in done.stdout + shown
    rates = {entry["step"]: entry["learning_rate"] for entry in record["logs"] if "loss" in entry}
    assert [*rates] == [*range(4, 201, 4)]
    for step, rate in rates.items():  # 0.01 at the peak after 12 steps, then down to 0; half of it after the restart
        plain = 0.01 * min((step - 1) / 12, (200 - step + 1) / 188)
        assert rate == pytest.approx(plain * (0.5 if step > 100 else 1)), step
    assert [entry["step"] for entry in record["history"]] == sorted({entry["step"] for entry in record["history"]})


def test_a_run_that_always_collapses_is_restarted_twice(folder: Path, tmp_path: Path) -> None:
    """From another checkpoint each time; the third time, the record has the step and the rate of that moment."""
    write_rows(tmp_path / "data.csv", 400)
    new = tmp_path / "new"
    options = ("--method", "toy-low-rank", "--model", folder / "tiny", "--data", tmp_path / "data.csv", "--out", new)
    settings = ("--lr", "0.02", "--epochs", "5", "--batch-size", "8", "--set", "on_collapse=restart")
    kept = ("--set", "save_steps=40", "--set", "save_total_limit=5")
    with collapsing(101, by=1000, times=3):
        done = succeeded("train", *options, *settings, *kept)
    record = record_of(new)
    assert [restart["from_step"] for restart in record["restarts"]] == [80, 40]
    assert [restart["learning_rate"] for restart in record["restarts"]] == [0.01, 0.005]
    assert "this run did not learn" in done.stdout
    problem, said = record["problems"][0], [line for line in done.stdout.splitlines() if "probably collapsed" in line]
    assert (problem["kind"], problem["fatal"], len(said)) == ("collapse", True, 3)
    assert problem["text"] in said[-1]
    assert 100 < problem["step"] <= 132
    assert problem["learning_rate"] > 0.1
    assert f"(step {problem['step']} of 200, learning rate {problem['learning_rate']:.3g})" in said[-1]


def test_ctrl_c_in_the_step_in_which_the_loss_is_lost_ends_a_run(folder: Path, tmp_path: Path) -> None:
    """It is not restarted then; the next call goes on with the restart."""
    write_rows(tmp_path / "data.csv", 400)
    new = tmp_path / "new"
    options = ("--method", "toy-low-rank", "--model", folder / "tiny", "--data", tmp_path / "data.csv", "--out", new)
    settings = ("--lr", "0.01", "--epochs", "5", "--batch-size", "8", "--set", "on_collapse=restart")
    lost = Watching._judge

    def interrupted(self: Watching, entry: dict[str, Any]) -> None:
        try:
            lost(self, entry)
        except LostError:
            self.interrupted = True
            raise

    with collapsing(101, by=1000), mock.patch.object(Watching, "_judge", interrupted):
        done = command("train", *options, *settings)
    assert (done.exit_code, "go on with: tunerkit train --out" in done.stderr) == (130, True)
    succeeded("train", "--out", new, "--resume")
    assert len(record_of(new)["restarts"]) == 1


def test_a_restarted_run_that_is_interrupted_is_resumed_at_its_own_rate(folder: Path, tmp_path: Path) -> None:
    """Before its first own checkpoint and after it: the end is that of the run that was not interrupted."""
    write_rows(tmp_path / "data.csv", 400)
    options = ("--method", "toy-growing", "--model", folder / "tiny", "--data", tmp_path / "data.csv")
    settings = ("--lr", "0.01", "--epochs", "5", "--batch-size", "8", "--set", "on_collapse=restart")
    with collapsing(101):
        succeeded("train", *options, *settings, "--out", tmp_path / "whole")
    parts = tmp_path / "parts"
    original = Watching.on_step_end

    def interrupt(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == 112 and (parts / "checkpoints" / "restarts.json").exists():
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, args, state, control, **kwargs)

    with mock.patch.object(Watching, "on_step_end", interrupt), collapsing(101):
        assert command("train", *options, *settings, "--out", parts).exit_code == 130
    shutil.rmtree(parts / "checkpoints" / "checkpoint-112")  # as if it had been killed
    with signalled(152, signal.SIGINT):
        assert command("train", "--out", parts, "--resume").exit_code == 130
    succeeded("train", "--out", parts, "--resume")
    assert_same_end(tmp_path / "whole", parts)


def test_a_loss_that_is_not_finite_restarts_a_run_that_may(folder: Path, tmp_path: Path) -> None:
    """From the newest checkpoint before it."""
    write_rows(tmp_path / "data.csv", 400)
    new = tmp_path / "new"
    options = ("--method", "toy-low-rank", "--model", folder / "tiny", "--data", tmp_path / "data.csv", "--out", new)
    settings = ("--lr", "0.01", "--epochs", "2", "--batch-size", "8", "--set", "on_collapse=restart")
    with collapsing(50, by=float("inf")):
        succeeded("train", *options, *settings)
    (restart,) = record_of(new)["restarts"]
    assert restart["from_step"] == 48
    assert restart["text"].startswith("the loss is nan at step 5")


def test_a_baseline_that_is_better_is_a_problem(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record names it beside the baseline."""
    better = {"what": "the head alone", "metrics": {"accuracy": 1.5}}
    monkeypatch.setattr(running, "head_alone", lambda *_: better)
    done = succeeded(*arguments, "--out", tmp_path / "new", "--baseline", "--set", "max_steps=2")
    (problem,) = record_of(tmp_path / "new")["problems"]
    assert problem["kind"] == "head_alone"
    assert f"this run learned less than it should: {problem['text']}; try more steps than these 2," in done.stdout
    assert problem["text"] in (tmp_path / "new" / "report.html").read_text(encoding="utf-8")


def test_the_demo_says_what_a_good_result_is() -> None:
    """A run on data of one's own does not."""
    said: list[str] = []
    for recipe in (Recipe(), Recipe(data="mine.csv")):
        file = io.StringIO()
        describing.conclude(recipe, {"task": "text-classification"}, Console(file=file))
        said.append(file.getvalue())
    assert said == ["a good result of this demo is accuracy 0.83 to 0.86; the head alone reaches 0.71\n", ""]


# --- the baseline ---


def test_the_baseline_is_the_head_alone_at_its_best(folder: Path) -> None:
    """Its training loss is below that of the head as it is; the base runs once over the rows, and is unchanged."""
    task, data = running_data.prepare_data(Recipe(data=str(folder / "data.csv")), Console(quiet=True))
    loaded = load_pretrained(task.name, str(folder / "tiny"), labels=("bad", "good"))
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    modes: list[bool] = []
    loaded.model.bert.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    rows = task.encode(data.train, loaded)
    found = baseline.head_alone(task, loaded, "classifier", (rows, rows))
    assert modes == [False, False]  # one batch for each part; dropout is off
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())
    assert found["parameters"] == 2 * 16 + 2
    texts, labels = ([row[name] for row in data.train] for name in ("text", "label"))
    with torch.no_grad():
        logits = loaded.model(**loaded.processor(texts, padding=True, return_tensors="pt")).logits
    truth = torch.tensor([("bad", "good").index(label) for label in labels])
    assert found["metrics"]["loss"] < float(torch.nn.functional.cross_entropy(logits, truth))


def test_a_class_that_is_held_out_alone_is_never_the_answer(folder: Path) -> None:
    """Its rows count as wrong, and there is no finite loss."""
    task, data = running_data.prepare_data(Recipe(data=str(folder / "data.csv")), Console(quiet=True))
    loaded = load_pretrained(task.name, str(folder / "tiny"), labels=("ugly", "bad", "good"))
    held_out = [{**row, "label": "ugly"} for row in data.held_out]
    rows = (task.encode(data.train, loaded), task.encode(held_out, loaded))
    metrics = baseline.head_alone(task, loaded, "classifier", rows)["metrics"]
    assert (metrics["accuracy"], metrics["loss"]) == (0.0, float("inf"))


def test_a_head_that_takes_whole_sequences_has_no_baseline(folder: Path) -> None:
    """RoBERTa's head takes a vector for each token; these would have to be kept for all rows."""
    task, data = running_data.prepare_data(Recipe(data=str(folder / "data.csv")), Console(quiet=True))
    loaded = load_pretrained(task.name, str(folder / "tiny"), labels=("bad", "good"))
    loaded.model.dropout.register_forward_hook(lambda module, args, out: out.unsqueeze(1))
    rows = (task.encode(data.train, loaded), task.encode(data.held_out, loaded))
    with pytest.raises(tunerkit.TunerkitError, match="more than one vector for each row"):
        baseline.head_alone(task, loaded, "classifier", rows)


def test_a_run_with_its_baseline(arguments: list[str], tmp_path: Path) -> None:
    """The record has the baseline, which trains nothing that would leave a checkpoint."""
    succeeded(*arguments, "--out", tmp_path / "new", "--baseline", "--set", "max_steps=2")
    found = record_of(tmp_path / "new")["baseline"]
    assert {*found["metrics"]} == {"accuracy", "f1", "loss"}
    assert found["heads"] == ["classifier"]
    assert {path.name for path in (tmp_path / "new" / "checkpoints").iterdir()} <= {"checkpoint-1", "checkpoint-2"}
