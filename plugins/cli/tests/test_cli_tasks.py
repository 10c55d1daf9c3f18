"""The tasks: from rows to predictions, on random models of two layers."""

import importlib.util
import io
import json
import math
import random
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import tunerkit
from tests.support.tiny_classifier import WORDS, save_tiny_classifier
from tests.support.tiny_models import SIDE, save_tiny_llama, save_tiny_roberta, save_tiny_t5, save_tiny_vit
from tunerkit_cli.folder import as_json
from tunerkit_cli.machine.hardware import computing_in
from tunerkit_cli.preparing.data import prepare_data, read_rows
from tunerkit_cli.preparing.session import prepare
from tunerkit_cli.recipes.recipe import Recipe, Source
from tunerkit_cli.report.record import GREATEST
from tunerkit_cli.rows import DataError, Table, read_table
from tunerkit_cli.running.record import model_facts
from tunerkit_cli.running.training import evaluate, train
from tunerkit_cli.tasks import TASKS, TaskError, task_of
from tunerkit_cli.tasks.base import MissingPackageError, require_package
from tunerkit_cli.tasks.formats import infer
from tunerkit_cli.tasks.generating import Answering, generate
from tunerkit_cli.tasks.language import GenerationTask
from tunerkit_cli.tasks.texts import short_to_long, token_limit
from tunerkit_cli.tasks.tokens import entities
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import LowRankPlugin
from tunerkit_transformers.output_folder import RECORD, load_run, read_run
from tunerkit_transformers.pretrained import load_pretrained

Rows = list[dict[str, Any]]
QUIET = Console(quiet=True)


def table(*rows: Mapping[str, object]) -> Table:
    return Table("data", tuple(rows[0]), rows)


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS[2:], k=rng.randint(2, 6)))


# --- training: each task from a file to predictions ---


@attrs.frozen
class Case:
    """Data of one task and what trains on it: ``row`` makes the row of a number."""

    task: str
    model: str
    row: Callable[[int, random.Random], dict[str, Any]]
    needs: str = "datasets"
    inferred: bool = True
    epochs: int = 10
    rate: float = 0.05


def classified(number: int, rng: random.Random) -> dict[str, Any]:
    return {"text": f"{WORDS[number % 2]} {sentence(rng)}", "label": WORDS[number % 2]}


def paired(number: int, rng: random.Random) -> dict[str, Any]:
    return {"premise": sentence(rng), "hypothesis": WORDS[number % 2], "label": number % 2}


def rated(number: int, rng: random.Random) -> dict[str, Any]:
    return {"text": (text := sentence(rng)), "label": text.count("film") - text.count("plot")}


def labelled(number: int, rng: random.Random) -> dict[str, Any]:
    return {"text": (text := sentence(rng)), "label": sorted({"film", "plot"} & set(text.split()))}


def tagged(number: int, rng: random.Random) -> dict[str, Any]:
    words = sentence(rng).split()
    return {"tokens": words, "tags": ["noun" if word in ("film", "plot") else "other" for word in words]}


def answered(number: int, rng: random.Random) -> dict[str, Any]:
    return {"prompt": ("the film ", "a plot ")[number % 2], "completion": ("very good", "not bad")[number % 2]}


def said(number: int, rng: random.Random) -> dict[str, Any]:
    asked = answered(number, rng)
    roles = {"user": asked["prompt"], "assistant": asked["completion"]}
    return {"messages": [{"role": role, "content": text} for role, text in roles.items()]}


def written(number: int, rng: random.Random) -> dict[str, Any]:
    return {"text": "".join(answered(number, rng).values())}


def preferred(number: int, rng: random.Random) -> dict[str, Any]:
    return {"prompt": "the film ", "chosen": "good", "rejected": "bad"}


def judged(number: int, rng: random.Random) -> dict[str, Any]:
    return {"prompt": "the film ", "completion": ("good", "bad")[number % 2], "label": number % 2 == 0}


def translated(number: int, rng: random.Random) -> dict[str, Any]:
    return {"source": ("the film", "a plot")[number % 2], "target": ("very good", "not bad")[number % 2]}


def near(number: int, rng: random.Random) -> dict[str, Any]:
    first, second = WORDS[number % 8], WORDS[number // 8]
    following = dict(zip(WORDS, WORDS[1:] + WORDS[:1], strict=True))
    return {"anchor": f"{first} {second}", "positive": f"{following[first]} {following[second]}"}


EPOCH = 4  # steps, each of which logs its loss: 32 of 40 rows in batches of 8
CASES = {
    "text-classification": Case("text-classification", "bert", classified),
    "text pairs": Case("text-classification", "bert", paired, epochs=20, rate=0.02),
    "regression": Case("regression", "bert", rated, inferred=False, epochs=25, rate=0.02),
    "multi-label": Case("multi-label", "bert", labelled, epochs=20, rate=0.025),
    "token-classification": Case("token-classification", "bert", tagged),
    "causal-lm, completions": Case("causal-lm", "llama", answered, "trl"),
    "causal-lm, messages": Case("causal-lm", "llama", said, "trl"),
    "causal-lm, texts": Case("causal-lm", "llama", written, "trl"),
    "preference": Case("preference", "llama", preferred, "trl"),
    "orpo": Case("orpo", "llama", preferred, "trl", inferred=False),
    "kto": Case("kto", "llama", judged, "trl", inferred=False),
    "reward": Case("reward", "llama", preferred, "trl", inferred=False),
    "seq2seq": Case("seq2seq", "t5", translated),
    "image-classification": Case("image-classification", "vit", classified, "PIL"),
    "embedding": Case("embedding", "bert", near, "sentence_transformers"),
}
SAVERS = {
    "bert": save_tiny_classifier,
    "llama": save_tiny_llama,
    "roberta": save_tiny_roberta,
    "t5": save_tiny_t5,
    "vit": save_tiny_vit,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model, which is saved when a test first asks for it."""
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        return root / name if (root / name).exists() else SAVERS[name](root / name)

    return folder


def write_data(case: Case, folder: Path) -> Path:
    rng = random.Random(0)
    if case.needs == "PIL":
        from PIL import Image

        for name, color in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
            (folder / name).mkdir(parents=True)
            for number in range(20):
                pixels = np.clip(
                    np.array(color) + np.random.RandomState(number).randint(-30, 30, (SIDE, SIDE, 3)), 0, 255
                )
                Image.fromarray(pixels.astype("uint8")).save(folder / name / f"{number}.png")
        return folder
    path = folder.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(case.row(number, rng)) + "\n" for number in range(40)))
    return path


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_each_task_learns_and_predicts_the_same_after_loading(
    name: str, precision: str, models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss falls, held-out rows have metrics, and a fresh base with the adapter predicts the same.

    So it does after a training in bf16, both in the weights' own precision and in that of the training. Nothing is
    written but the output folder, and the task follows from the columns.
    """
    case = CASES[name]
    pytest.importorskip(case.needs)
    monkeypatch.chdir(tmp_path)
    data = write_data(case, tmp_path / "data")
    recipe = Recipe(
        task=None if case.inferred else case.task,
        model=str(models(case.model)),
        data=str(data),
        method="toy-low-rank",
        config={"rank": 4},
        training={
            "num_train_epochs": case.epochs,
            "learning_rate": case.rate,
            "per_device_train_batch_size": 8,
            "save_strategy": "no",
            "eval_strategy": "epoch",
            "logging_steps": 1,
        },
        precision=precision,
        out="out",
    )
    device = torch.device("cpu")
    with registered(LowRankPlugin()):
        task, rows = prepare_data(recipe, QUIET)
        assert task.name == case.task
        session = prepare(recipe, task, rows, QUIET)
        trained = evaluate(session, train(session, QUIET, resume=False))
        losses = [entry["loss"] for entry in trained.logs if "loss" in entry]
        assert np.mean(losses[-EPOCH:]) < 0.9 * np.mean(losses[:EPOCH])
        assert trained.metrics[task.main_metric] == pytest.approx(trained.metrics[task.main_metric])  # no NaN
        logged = next(entry for entry in reversed(trained.logs) if "eval_loss" in entry)
        if not isinstance(task, GenerationTask):  # each metric may choose the best checkpoint
            assert {name: logged[f"eval_{name}"] for name in trained.metrics} == pytest.approx(trained.metrics)
        before = task.predict(session.loaded, rows.held_out, batch_size=4)
        with computing_in(precision, device):
            as_trained = task.predict(session.loaded, rows.held_out, batch_size=4)
        json.dumps(before)
        tunerkit.save(session.loaded.model, "out")
        session.loaded.processor.save_pretrained("out")
        model = model_facts(session.loaded, session.trainer.args.seed, Path("out"))
        record = {"version": 1, "task": task.name, "model": model, "labels": list(rows.labels)}
        Path("out", RECORD).write_text(as_json(record))
        fresh = load_run(read_run("out"))
        assert same(task.predict(fresh, rows.held_out, batch_size=4), before)
        assert same(task.predict(fresh, rows.held_out[:1], batch_size=1), before[:1])
        with computing_in(precision, device):
            assert same(task.predict(fresh, rows.held_out, batch_size=4), as_trained)
    assert {path.name for path in tmp_path.iterdir()} <= {"out", data.name}


def same(first: object, second: object) -> bool:
    """Whether predictions are equal, their numbers within rounding."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[name], second[name]) for name in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == (pytest.approx(second, abs=1e-5) if isinstance(second, float) else second))


# --- metrics ---


def results_of(task: str, truth: object, predictions: object) -> dict[str, float]:
    """The metrics of a task for what a trainer's prediction returned, which are those that it logs.

    Of token classification, each row is one window, and the tags mark no entities.
    """
    outputs = {"label_ids": np.array(truth), "predictions": np.array(predictions)}
    trainer = SimpleNamespace(
        predict=lambda dataset: SimpleNamespace(**outputs, metrics={"test_loss": 0.5}),
        args=SimpleNamespace(train_sampling_strategy="random"),
        model=SimpleNamespace(config=SimpleNamespace(id2label={0: "a", 1: "b"})),
    )
    numbers = list(range(len(outputs["label_ids"])))
    results = task_of(task).evaluate(trainer, {"row": numbers, "window": numbers}).metrics
    assert {**task_of(task).compute_metrics(SimpleNamespace(**outputs)), "loss": 0.5} == results
    return results


def test_accuracy_f1_and_confusion_are_those_by_hand() -> None:
    """Class 0: 2 of 3 found, 2 of 3 right; class 1: 2 of 2, 2 of 3 right; class 2: never predicted, so its F1 is 0."""
    truth, logits = np.array([0, 0, 0, 1, 1, 2]), np.eye(3)[[0, 0, 1, 1, 1, 0]]
    assert task_of("text-classification").confusion(logits, truth) == [[2, 1, 0], [0, 2, 0], [1, 0, 0]]
    assert task_of("text-classification").scores(logits, truth) == {
        "accuracy": pytest.approx(4 / 6),
        "f1": pytest.approx((2 / 3 + 0.8 + 0) / 3),
    }


def test_a_class_that_no_row_has_is_not_counted_in_the_mean() -> None:
    """Class 2 is neither true nor predicted, class 3 is predicted alone and counts 0: as in scikit-learn's default."""
    truth, logits = np.array([0, 0, 1]), np.eye(4)[[0, 3, 1]]
    assert task_of("text-classification").scores(logits, truth)["f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    confusion = task_of("text-classification").confusion(logits, truth)
    assert confusion is not None
    assert len(confusion) == 4


def test_tokens_without_a_tag_do_not_count() -> None:
    """Special tokens, further tokens of a word and padding have the label -100; of the others, 2 of 3 are right."""
    logits = [[[9, 0], [1, 0], [0, 1], [9, 0]], [[9, 0], [1, 0], [9, 0], [9, 0]]]
    metrics = results_of("token-classification", [[-100, 0, 1, -100], [-100, 1, -100, -100]], logits)
    assert metrics["accuracy"] == pytest.approx(2 / 3)


def test_the_f1_of_label_lists_is_over_all_labels() -> None:
    """2 labels are found, 1 is wrong and 1 is missed: F1 is 4/6; 1 of 3 rows is exactly right."""
    metrics = results_of("multi-label", [[1, 0], [1, 0], [0, 1]], [[1.0, -1], [1, 1], [-1, -1]])
    assert metrics == {"f1": pytest.approx(4 / 6), "exact": pytest.approx(1 / 3), "loss": 0.5}


def test_errors_of_numbers_are_those_by_hand() -> None:
    """Errors of 0, 1 and 2 at a variance of 2/3; R² needs two rows."""
    metrics = results_of("regression", [1.0, 3, 2], [[1.0], [2], [4]])
    assert metrics == {"loss": 0.5, "mae": pytest.approx(1.0), "r2": pytest.approx(-1.5)}
    assert set(results_of("regression", [1.0], [[1.0]])) == {"loss", "mae"}


def test_perplexity_is_the_exponential_of_the_loss() -> None:
    """A loss of ln 3 is the perplexity of three equal choices; that of a huge loss is one that a record may hold."""
    for loss, expected in ((math.log(3), 3.0), (1e9, math.exp(230))):
        assert expected < GREATEST
        untrained = SimpleNamespace(global_step=0, log_history=[])
        trainer = SimpleNamespace(
            evaluate=lambda dataset, loss=loss: {"eval_loss": loss}, state=untrained, eval_dataset=None
        )
        found = task_of("causal-lm").evaluate(trainer, None)
        assert found.metrics == {"loss": loss, "perplexity": pytest.approx(expected)}


# --- rows ---


def test_columns_are_found_by_other_names_and_by_those_of_the_recipe() -> None:
    """A synonym counts if it is the only one; a name in the recipe comes first."""
    task = task_of("text-classification")
    assert task.rows(table({"sentence": "x", "class": "a"}), {}) == [{"text": "x", "label": "a"}]
    assert task.rows(table({"text": "x", "t": "y", "label": "a"}), {"text": "t"}) == [{"text": "y", "label": "a"}]
    assert task.rows(table({"sentence": "x"}), {}, predicting=True) == [{"text": "x"}]
    with pytest.raises(DataError, match=r"'text' may be 'sentence' or 'review'; .*columns.text .*--text-column"):
        task.rows(table({"sentence": "x", "review": "y", "label": "a"}), {})


def test_a_pair_that_the_recipe_names_must_be_there() -> None:
    """Without its name in the recipe, the second text may be missing."""
    task, pair = task_of("text-classification"), table({"premise": "x", "hypothesis": "y", "label": 1})
    assert task.rows(pair, {}) == [{"text": "x", "text_pair": "y", "label": "1"}]
    assert task.rows(table({"text": "x", "label": 1}), {}) == [{"text": "x", "label": "1"}]
    with pytest.raises(DataError, match="text-classification needs a column 'second'"):
        task.rows(table({"text": "x", "label": 1}), {"text_pair": "second"})


@pytest.mark.parametrize("name", TASKS)
def test_a_mistyped_name_of_a_column_is_refused(name: str) -> None:
    """It would be without effect."""
    first = task_of(name).columns[0].name
    with pytest.raises(DataError, match=rf"columns.x{first}: .* {name} has no such column; .*did you mean '{first}'"):
        task_of(name).rows(table({"a": 1}), {f"x{first}": "a"})


@pytest.mark.parametrize(
    ("value", "name"), [("a", "a"), (3, "3"), (3.0, "3"), (True, "True"), ("3.5", "3.5"), (" b ", " b ")]
)
def test_a_class_is_a_text_or_a_whole_number(value: object, name: str) -> None:
    """Parquet files have whole numbers as floats where another row has none."""
    assert task_of("text-classification").rows(table({"text": "x", "label": value}), {}) == [
        {"text": "x", "label": name}
    ]


def test_classes_are_in_the_order_of_their_numbers() -> None:
    """Class 10 comes after class 9."""
    task = task_of("text-classification")
    assert task.labels([{"label": label} for label in ("10", "9", "9")]) == ("9", "10")


@pytest.mark.parametrize("value", ['["a", "b"]', ["a", "b"]])
def test_lists_of_labels_are_lists_or_json(value: object) -> None:
    """A cell of a csv file holds JSON; a list may be empty."""
    task = task_of("multi-label")
    assert task.rows(table({"text": "x", "label": value}), {}) == [{"text": "x", "label": ["a", "b"]}]
    assert task.rows(table({"text": "x", "label": "[]"}), {}) == [{"text": "x", "label": []}]


def test_a_language_model_reads_the_columns_of_one_form_only() -> None:
    """Other columns may be empty: of a file with messages and prompts, the messages count."""
    task, said = task_of("causal-lm"), [{"role": "user", "content": "x"}]
    assert task.rows(table({"messages": said, "prompt": None, "text": ""}), {}) == [{"messages": said}]
    assert task.rows(table({"instruction": "x", "response": "y"}), {}) == [{"prompt": "x", "completion": "y"}]
    assert task.rows(table({"prompt": "x"}), {}, predicting=True) == [{"prompt": "x"}]
    with pytest.raises(DataError, match="has the columns 'prompt'; causal-lm needs"):
        task.rows(table({"prompt": "x"}), {})
    with pytest.raises(DataError, match="causal-lm needs a column 'answers'"):
        task.rows(table({"prompt": "x"}), {"completion": "answers"})


def test_the_names_in_a_recipe_choose_the_form_of_a_language_models_rows() -> None:
    """Of the columns that are there, the first form counts only if it has all the named ones."""
    task, said = task_of("causal-lm"), [{"role": "user", "content": "x"}]
    both = table({"messages": said, "body": "y", "q": "z", "response": "w"})
    assert task.rows(both, {"text": "body"}) == [{"text": "y"}]
    assert task.rows(both, {"prompt": "q"}) == [{"prompt": "z", "completion": "w"}]
    assert task.rows(both, {"prompt": "q"}, predicting=True) == [{"prompt": "z"}]
    with pytest.raises(DataError, match="needs a column 'bodies'"):
        task.rows(both, {"text": "bodies"})
    with pytest.raises(DataError, match=r"columns.prompt and columns.text: no form of data has all of them; name"):
        task.rows(both, {"prompt": "q", "text": "body"})


@pytest.mark.parametrize(
    ("prompt", "second"), [("instruction", "input"), ("instruction", "context"), ("question", "context")]
)
def test_an_instruction_that_goes_on_in_another_column_is_not_cut_short(prompt: str, second: str) -> None:
    """Alpaca's and Dolly's rows ask in two columns; a column that the user names, or called prompt, is the whole."""
    for task, rest in (("causal-lm", {"output": "z"}), ("preference", {"chosen": "z", "rejected": "w"})):
        rows = table({prompt: "x", second: "y", **rest})
        for predicting in (False, True):
            assert read_rows(task_of(task), [rows], {}, predicting=predicting).rows[0]["prompt"] == "x\ny"
        assert read_rows(task_of(task), [rows], {"prompt": prompt}).rows[0]["prompt"] == "x"
        alone = table({"prompt": "x", second: "y", **rest})
        assert read_rows(task_of(task), [alone], {}).rows[0]["prompt"] == "x"
    translated = read_rows(task_of("seq2seq"), [table({prompt: "x", second: "y", "output": "z"})], {})
    assert translated.rows == [{"source": "x\ny", "target": "z"}]
    assert translated.columns == {"source": f"{prompt} + {second}", "target": "output"}


_USER, _ASSISTANT = ([{"role": role, "content": "x"}] for role in ("user", "assistant"))


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        (
            "causal-lm",
            [{"prompt": "x", "completion": _ASSISTANT}],
            "row 1: prompt is a text, completion is a list; write",
        ),
        ("causal-lm", [{"prompt": _USER, "completion": "x"}], "row 1: prompt is a list, completion is a text; write"),
        (
            "causal-lm",
            [{"prompt": "x", "completion": "y"}, {"prompt": _USER, "completion": _ASSISTANT}],
            "row 2, column 'prompt': is a list, and row 1 has a text; write all rows as texts, or all as lists",
        ),
        (
            "preference",
            [dict.fromkeys(("prompt", "chosen", "rejected"), value) for value in (_USER, "x")],
            "row 2, column 'prompt': is a text, and row 1 has a list",
        ),
        ("causal-lm", [{"messages": _ASSISTANT}], "row 1, column 'messages': the only message is the assistant's; add"),
        ("causal-lm", [{"text": _USER}], "row 1, column 'text': expected text, got"),
    ],
)
def test_texts_and_conversations_are_not_mixed(task: str, rows: Rows, message: str) -> None:
    """The trainers of TRL look at the first row alone, and an answer to nothing cannot be asked for."""
    with pytest.raises(DataError, match=message):
        task_of(task).rows(table(*rows), {})


def test_what_is_predicted_is_not_read() -> None:
    """Rows to predict may have empty, unknown or wrong labels, and several columns that could have them."""
    for task, row, wanted in (
        ("text-classification", {"text": "x", "class": None, "category": ["?"]}, {"text": "x"}),
        ("regression", {"text": "x", "label": "?"}, {"text": "x"}),
        ("token-classification", {"tokens": ["x"], "tags": []}, {"tokens": ["x"]}),
        ("causal-lm", {"prompt": "x", "completion": ""}, {"prompt": "x"}),
        ("preference", {"prompt": "x", "chosen": None, "rejected": None}, {"prompt": "x"}),
        ("seq2seq", {"source": "x", "target": None}, {"source": "x"}),
    ):
        assert task_of(task).rows(table(row), {}, predicting=True) == [wanted]


def test_paths_of_images_are_relative_to_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image in the file's own folder comes first, then one in the working folder."""
    image = pytest.importorskip("PIL.Image")
    for name in ("data/a.png", "a.png", "b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image.new("RGB", (SIDE, SIDE)).save(tmp_path / name)
    (tmp_path / "data" / "rows.csv").write_text("image,label\na.png,x\nb.png,y\n")
    monkeypatch.chdir(tmp_path)
    rows = task_of("image-classification").rows(read_table(Path("data/rows.csv")), {})
    assert [Path(row["image"]) for row in rows] == [Path("data/a.png"), Path("b.png")]
    (tmp_path / "b.png").unlink()
    with pytest.raises(
        DataError, match=r"row 2, column 'image': there is no file 'b.png'; .*relative to the folder of"
    ):
        task_of("image-classification").rows(read_table(Path("data/rows.csv")), {})


def test_a_class_may_be_rare(models: Callable[[str], Path], tmp_path: Path) -> None:
    """Wherever its only row stands, it is trained and not held out."""
    rows = [f"{word},{word}\n" for word in ("good", "bad") * 10]
    for place in range(len(rows)):
        path = tmp_path / "data.csv"
        path.write_text("".join(["text,label\n", *rows[:place], "film,rare\n", *rows[place:]]))
        _, data = prepare_data(Recipe(data=str(path)), QUIET)
        assert data.labels == ("bad", "good", "rare")
        assert [row["label"] for row in data.held_out].count("rare") == 0
        assert data.findings["classes_not_held_out"] == ["rare"]


# --- what is odd about rows ---


def prepared(recipe: Recipe) -> tuple[Any, str]:
    """The data of a recipe, and what is printed about them."""
    console = Console(file=io.StringIO(), width=1000)
    _, data = prepare_data(recipe, console)
    return data, console.file.getvalue()  # type: ignore[attr-defined]


def write_csv(path: Path, rows: list[tuple[str, str]]) -> str:
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows), encoding="utf-8")
    return str(path)


def test_the_held_out_fifth_has_a_fifth_of_each_class(tmp_path: Path) -> None:
    """Of rare classes too, by which macro F1 is measured."""
    counts = {"a": 50, "b": 25, "c": 10, "d": 5}
    rows = [(f"{name} {number}", name) for name, count in counts.items() for number in range(count)]
    data, said = prepared(Recipe(data=write_csv(tmp_path / "d.csv", rows)))
    assert Counter(row["label"] for row in data.held_out) == {name: count // 5 for name, count in counts.items()}
    assert len(data.train) + len(data.held_out) == 90
    assert said == ""
    assert data.findings == {"also_trained": 0}
    assert data.held_out_source == f"a fifth of each class of {tmp_path / 'd.csv'}"


def test_images_are_the_same_if_each_byte_is(tmp_path: Path) -> None:
    """Also bytes far behind those that are compared first."""
    start = b"x" * 9000
    for name, content in {"one": start + b"1", "copy": start + b"1", "end": start + b"2", "short": start}.items():
        (tmp_path / name).write_bytes(content)
    task = task_of("image-classification")
    names = {task.identity({"image": str(tmp_path / name)}): name for name in ("one", "copy", "end", "short")}
    assert [*names.values()] == ["copy", "end", "short"]


def test_held_out_rows_that_are_trained_too_are_counted_and_named(tmp_path: Path) -> None:
    """They stay; another label for the same text is counted too. With --eval-data equal to --data it is every row."""
    rows = [(f"text {number}", "ab"[number % 2]) for number in range(20)]
    train = write_csv(tmp_path / "train.csv", rows)
    held = write_csv(tmp_path / "held.csv", [("new", "a"), ("text 3", "b"), ("newer", "b"), ("text 4", "b")])
    data, said = prepared(Recipe(data=train, eval_data=held))
    assert said == (
        f"note: 2 of 4 held-out rows are also in the training rows (1 with another label), such as row 2 of {held}: "
        "'text 3'; what is measured there says little of new rows\n"
    )
    assert data.findings == {
        "also_trained": 2,
        "also_trained_with_another_label": 1,
        "also_trained_example": {"source": held, "row": 2},
    }
    assert (len(data.train), len(data.held_out)) == (20, 4)
    data, said = prepared(Recipe(data=train, eval_data=train))
    assert data.findings["also_trained"] == len(data.held_out) == 20
    assert "20 of 20 held-out rows are also in the training rows, such as row 1 of" in said
    data, said = prepared(Recipe(data=write_csv(tmp_path / "twice.csv", rows + rows)))
    seen = {row["text"] for row in data.train}
    assert data.findings["also_trained"] == sum(row["text"] in seen for row in data.held_out) > 0


def test_copies_of_an_image_are_the_same_row(tmp_path: Path) -> None:
    """By their content: the files have other names, and other files of the same size are others."""
    image = pytest.importorskip("PIL.Image")
    for number in range(8):
        for name in ("red", "blue"):
            path = tmp_path / "train" / name / f"{number}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.new("RGB", (80, 80), (number, 0, 9 * (name == "red"))).save(path)
    (tmp_path / "held" / "red").mkdir(parents=True)
    image.new("RGB", (80, 80), (3, 0, 9)).save(tmp_path / "held" / "red" / "copy.bmp")
    almost = image.new("RGB", (80, 80), (4, 0, 9))
    almost.putpixel((0, 0), (5, 0, 9))  # a bmp file ends with its first row
    almost.save(tmp_path / "held" / "red" / "other.bmp")
    data, said = prepared(Recipe(data=str(tmp_path / "train"), eval_data=str(tmp_path / "held")))
    assert data.findings["also_trained"] == 1
    assert "such as row 1 of" in said
    assert "classes in the training rows alone, so they are not measured: 'blue' (8)" in said


def test_classes_of_one_part_alone_are_counted_and_named(tmp_path: Path) -> None:
    """Of label lists, which are not split by class: wherever the one row with a label is."""
    rows = [{"text": f"text {number}", "label": ["a", *(["b"] * (number == 7))]} for number in range(20)]
    parts = set()
    for place in range(20):
        path = tmp_path / "d.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[place:] + rows[:place]))
        data, said = prepared(Recipe(data=str(path)))
        held = sum("b" in row["label"] for row in data.held_out)
        key, where = (
            ("classes_not_trained", "held-out rows alone, so they cannot be learned")
            if held
            else ("classes_not_held_out", "training rows alone, so they are not measured")
        )
        assert data.findings == {"also_trained": 0, key: ["b"]}
        assert said == f"note: classes in the {where}: 'b' (1)\n"
        parts.add(key)
    assert len(parts) == 2


def test_labels_are_read_without_what_nobody_sees_in_them(tmp_path: Path) -> None:
    """White space and Unicode forms are one class, which is said with a count; held-out labels are read so too."""
    nfc, nfd = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    labels = ["good", " good", nfc, nfd]
    rows = [(f"text {number}", labels[number % 4]) for number in range(40)]
    data, said = prepared(Recipe(data=write_csv(tmp_path / "d.csv", rows)))
    assert data.labels == (nfc, "good")
    assert Counter(row["label"] for row in data.train + data.held_out) == {"good": 20, nfc: 20}
    assert "note: labels are read without white space around them and in the Unicode form NFC, which changes 20" in said
    assert "' good' as 'good'" in said
    held = write_csv(tmp_path / "held.csv", [("x", "good  "), ("y", nfd)])
    data, said = prepared(Recipe(data=str(tmp_path / "d.csv"), eval_data=held))
    assert [row["label"] for row in data.held_out] == ["good", nfc]
    for task, row, read in (
        ("multi-label", {"text": "x", "label": [" a", "b"]}, {"text": "x", "label": ["a", "b"]}),
        ("token-classification", {"tokens": [" x "], "tags": [" A"]}, {"tokens": [" x "], "tags": ["A"]}),
        ("regression", {"text": "x", "label": " 3"}, {"text": "x", "label": 3.0}),
    ):
        assert read_rows(task_of(task), [table(row)], {}).rows == [read]


def test_classes_that_look_alike_are_named_and_kept_apart(tmp_path: Path) -> None:
    """Which of them are meant to be one, only their author knows."""
    labels: list[object] = ["good", "Good", True, 1, "bad"]
    path = tmp_path / "d.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"text {n}", "label": labels[n % 5]}) + "\n" for n in range(50)), encoding="utf-8"
    )
    data, said = prepared(Recipe(data=str(path)))
    assert data.labels == ("1", "Good", "True", "bad", "good")
    assert said == (
        "note: these classes look alike, and are separate ones: '1' (10) and 'True' (10), 'Good' (10) and 'good' (10); "
        "if they mean the same, give them one name in the data\n"
    )


def test_several_files_are_one_file_in_parts(tmp_path: Path) -> None:
    """The rows, the split, the classes and the columns are those of one file with all rows, in whatever formats."""
    rows = [(f"text {number}", "abc"[number % 3]) for number in range(60)]
    whole, _ = prepared(Recipe(data=write_csv(tmp_path / "whole.csv", rows)))
    first = write_csv(tmp_path / "first.csv", rows[:20])
    second = tmp_path / "second.jsonl"
    second.write_text("".join(json.dumps({"text": text, "label": label, "id": 3}) + "\n" for text, label in rows[20:]))
    data, _ = prepared(Recipe(data=[first, str(second)]))
    assert (data.train, data.held_out, data.labels) == (whole.train, whole.held_out, whole.labels)
    assert data.source == f"{first} and {second}"
    assert data.unused == ("id",)
    held, _ = prepared(Recipe(data=first, eval_data=[first, str(second)]))
    assert held.held_out == [{"text": text, "label": label} for text, label in rows]
    assert held.held_out_source == f"{first} and {second}"


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            {"text": "x", "label": "a"},
            {"sentence": "x", "label": "a"},
            r"second.jsonl: has text \(column 'sentence'\), label .*, and .*first.jsonl has text \(column 'text'\)",
        ),
        ({"text": "x", "label": "a"}, {"text": "x", "text_pair": "y", "label": "a"}, "second.jsonl: has .*text_pair"),
        ({"text": "x", "label": "a"}, {"text": "x"}, "second.jsonl: text-classification needs a column 'label'"),
        ({"prompt": "x", "completion": "y"}, {"prompt": _USER, "completion": _ASSISTANT}, "column 'prompt', lists"),
    ],
)
def test_files_of_one_run_have_the_same_columns(
    first: dict[str, object], second: dict[str, object], message: str, tmp_path: Path
) -> None:
    """Otherwise one error names the file that differs."""
    paths: list[str | Source] = []
    for name, row in (("first", first), ("second", second)):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 10)
        paths.append(str(tmp_path / f"{name}.jsonl"))
    with pytest.raises(DataError, match=message) as caught:
        prepare_data(Recipe(data=paths), QUIET)
    assert "\n" not in str(caught.value)


# --- which task ---

_TEXTS = {"text": "x"}


@pytest.mark.parametrize(
    ("row", "task"),
    [
        ({**_TEXTS, "label": "a"}, "text-classification"),
        ({**_TEXTS, "label": 3}, "text-classification"),
        ({"sentence": "x", "category": "a"}, "text-classification"),
        ({**_TEXTS, "label": ["a"]}, "multi-label"),
        ({**_TEXTS, "label": '["a"]'}, "multi-label"),
        ({**_TEXTS, "label": "[sic]"}, "text-classification"),
        ({"tokens": ["a"], "tags": ["O"]}, "token-classification"),
        ({"words": ["a"], "ner_tags": ["O"]}, "token-classification"),
        ({"tokens": ["a"], "labels": ["O"]}, "token-classification"),
        ({"messages": []}, "causal-lm"),
        ({"instruction": "x", "response": "y"}, "causal-lm"),
        (_TEXTS, "causal-lm"),
        ({"prompt": "x", "chosen": "a", "rejected": "b"}, "preference"),
        ({"source": "x", "target": "y"}, "seq2seq"),
        ({"text": "x", "summary": "y"}, "seq2seq"),
        ({"image": "x.png", "label": "a"}, "image-classification"),
        ({"path": "x.png", "class": "a"}, "image-classification"),
        ({**_TEXTS, "path": "x.txt", "label": "a"}, "text-classification"),
    ],
)
def test_a_task_follows_from_columns_and_labels(row: dict[str, object], task: str) -> None:
    """Our own names decide first, then text and label, then other names."""
    assert infer(table(row), {}) == task


def test_names_of_the_recipe_count_when_a_task_is_inferred() -> None:
    """A name that is not in the data does not make the column of our name count."""
    row = {"text": "x", "label": "a", "q": "y", "a": "z"}
    assert infer(table(row), {"prompt": "q", "completion": "a"}) == "causal-lm"
    assert infer(table({"q": "x", "stars": "5"}), {"text": "q", "label": "stars"}) == "text-classification"
    assert infer(table(row), {"text": "sentence"}) == "text-classification"


@pytest.mark.parametrize("label", [4.5, "4.5", 3.0])
def test_numbers_with_a_point_are_asked_about(label: object) -> None:
    """They may be ratings or names of classes."""
    with pytest.raises(TaskError, match=r"has numbers such as .*\. Is this regression\? Pass --task regression"):
        infer(table({"text": "x", "label": label}), {})


def test_columns_that_fit_no_task_are_named() -> None:
    """With all tasks."""
    with pytest.raises(
        TaskError, match=r"its columns are 'a', 'b', which fit no task; .*text-classification, regression"
    ):
        infer(table({"a": 1, "b": 2}), {})


def test_a_mistyped_task_has_the_closest_name() -> None:
    """And the list of all."""
    with pytest.raises(TaskError, match=r"no task 'regresion'; did you mean 'regression'.*the tasks are"):
        task_of("regresion")


# --- details of tokens ---


def test_each_words_first_token_has_its_tag(models: Callable[[str], Path]) -> None:
    """Words of several tokens, words without tokens, and words beyond the limit keep all others in their places."""
    task = task_of("token-classification", 7)
    loaded = load_pretrained(task.name, str(models("bert")), labels=["0", "1"])
    words = ["good-film", " ", "bad", "plot", "the", "a"]
    row = {"tokens": words, "tags": ["1", "1", "0", "1", "0", "0"]}
    encoded = task.encode([row], loaded)  # [CLS] good - film bad plot [SEP] and [CLS] plot the a [SEP]
    assert list(encoded["labels"]) == [[-100, 1, -100, -100, 0, 1, -100], [-100, -100, 0, 0, -100]]
    (found,) = task.predict(loaded, [row], batch_size=1)
    assert found["tokens"] == words
    assert [tag is None for tag in found["tags"]] == [False, True, False, False, False, False]


def tags_by_hand(loaded: Any, words: list[str], limit: int) -> list[str]:
    """The tags of words, each of which has one or more tokens, from the window that shows most around the word."""
    encoded = loaded.processor(words, is_split_into_words=True, add_special_tokens=False)
    ids, of_word = encoded["input_ids"], encoded.word_ids()
    room = limit - 2
    starts = [0]
    while starts[-1] + room < len(ids):
        starts.append(starts[-1] + room - max(1, room // 4))
    tags = []
    for word in range(len(words)):
        token = of_word.index(word)
        seen = []
        for start in starts:
            end = min(start + room, len(ids))
            if start <= token < end and (token > start or start == 0):
                before, after = token - start, end - 1 - token
                seen.append((min(before if start else 999, after if end < len(ids) else 999), -start))
        start = -max(seen)[1]
        window = torch.tensor([[2, *ids[start : start + room], 3]])
        with torch.inference_mode():
            number = loaded.model(input_ids=window).logits[0, 1 + token - start].argmax().item()
        tags.append(loaded.model.config.id2label[number])
    return tags


@pytest.mark.parametrize("limit", [4, 7, 10, 16])
def test_every_word_has_the_tag_of_the_window_that_shows_most_around_it(
    limit: int, models: Callable[[str], Path]
) -> None:
    """Rows of any length, whose words have one to three tokens, in batches of windows of several rows."""
    task = task_of("token-classification", limit)
    loaded = load_pretrained(task.name, str(models("bert")), labels=["B-X", "I-X", "O"])
    rng = random.Random(limit)
    words = [*WORDS, "good-film", "bad-plot"]
    rows = [{"tokens": rng.choices(words, k=length)} for length in (1, 5, 40, 3, 17)]
    found = task.predict(loaded, rows, batch_size=3)
    assert [answer["tokens"] for answer in found] == [row["tokens"] for row in rows]
    assert [answer["tags"] for answer in found] == [tags_by_hand(loaded, row["tokens"], limit) for row in rows]


def test_every_word_is_evaluated_once_as_it_is_predicted(models: Callable[[str], Path], tmp_path: Path) -> None:
    """Accuracy and F1 of entities are those of the predicted tags of whole rows, which are longer than the model."""
    task = task_of("token-classification")
    loaded = load_pretrained(task.name, str(models("bert")), labels=["B-X", "I-X", "O"])
    rng = random.Random(1)
    rows = [{"tokens": rng.choices(WORDS, k=length)} for length in (40, 3, 25, 60)]
    predicted = [answer["tags"] for answer in task.predict(loaded, rows, batch_size=2)]
    names = ("B-X", "I-X", "O")
    wanted = [[tag if rng.random() < 0.8 else rng.choice(names) for tag in tags] for tags in predicted]
    encoded = task.encode([{**row, "tags": tags} for row, tags in zip(rows, wanted, strict=True)], loaded)
    assert len(encoded) > 2 * len(rows)
    assert sum(label >= 0 for labels in encoded["labels"] for label in labels) == 40 + 3 + 25 + 60
    for strategy in ("random", "group_by_length"):
        arguments = TrainingArguments(
            str(tmp_path), report_to="none", use_cpu=True, train_sampling_strategy=strategy, disable_tqdm=True
        )
        trainer = Trainer(loaded.model, arguments, **task.trainer_settings(loaded))
        shuffled = encoded.select(short_to_long(encoded))
        metrics = task.evaluate(trainer, shuffled).metrics
        assert trainer.args.train_sampling_strategy == strategy
        pairs = [*zip(chain(*wanted), chain(*predicted), strict=True)]
        assert metrics["accuracy"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
        true, found = (
            {(row, *each) for row, tags in enumerate(part) for each in entities_by_hand(tags)}
            for part in (wanted, predicted)
        )
        assert metrics["entity_f1"] == pytest.approx(2 * len(true & found) / (len(true) + len(found)))


def entities_by_hand(tags: list[str]) -> set[tuple[str, int, int]]:
    """All spans that begin an entity, go on to their end, and go no further."""

    def goes_on(place: int) -> bool:
        """Whether a word belongs to the entity of the word before it."""
        if not 0 < place < len(tags) or tags[place][0] not in "IEL" or tags[place - 1][0] not in "BI":
            return False
        return tags[place][2:] == tags[place - 1][2:]

    places = range(len(tags))
    return {
        (tags[start][2:], start, end + 1)
        for start in places
        for end in places[start:]
        if tags[start] != "O"
        and not goes_on(start)
        and all(goes_on(place) for place in range(start + 1, end + 1))
        and not goes_on(end + 1)
    }


@given(st.lists(st.sampled_from([*(f"{mark}-{kind}" for mark in "BIESLU" for kind in "xy"), "O"]), max_size=8))
def test_entities_are_the_spans_by_hand(tags: list[str]) -> None:
    """In all schemes, also with an I that nothing begins."""
    assert entities(tags) == entities_by_hand(tags)


def test_entities_of_a_well_formed_row() -> None:
    """IOB2 and IOBES of the same row; other tags mark none."""
    wanted = {("PER", 0, 2), ("LOC", 3, 4), ("LOC", 4, 6)}
    assert entities(["B-PER", "I-PER", "O", "B-LOC", "B-LOC", "I-LOC"]) == wanted
    assert entities(["B-PER", "E-PER", "O", "S-LOC", "B-LOC", "E-LOC"]) == wanted
    task = task_of("token-classification")
    assert task.main_metric_of(("B-PER", "I-PER", "O")) == "entity_f1"
    assert task.main_metric_of(("noun", "other")) == task.main_metric_of(("O", "X")) == "f1"


def test_words_have_the_tokens_that_they_have_in_a_sentence(models: Callable[[str], Path]) -> None:
    """In RoBERTa's vocabulary, a word after a space is another token than the middle of a word."""
    task = task_of("token-classification")
    loaded = load_pretrained(task.name, str(models("roberta")), labels=["0", "1"])
    encoded = task.encode([{"tokens": ["good", "film"], "tags": ["0", "1"]}], loaded)
    assert encoded["input_ids"][0] == loaded.processor(" good film")["input_ids"]
    assert [label for label in encoded["labels"][0] if label >= 0] == [0, 1]


def test_a_pair_is_encoded_as_two_texts(models: Callable[[str], Path]) -> None:
    """Both texts are there, and long ones are cut to the model's 16 positions."""
    task = task_of("text-classification")
    loaded = load_pretrained(task.name, str(models("bert")), labels=["a", "b"])
    encoded = task.encode([{"text": "good film", "text_pair": "bad plot " * 20, "label": "b"}], loaded)
    decoded = loaded.processor.decode(encoded["input_ids"][0], skip_special_tokens=True)
    assert decoded.startswith("good film bad plot bad plot")
    assert len(encoded["input_ids"][0]) == 16
    assert encoded["labels"] == [1]


@pytest.mark.parametrize(("name", "task"), [("llama", "causal-lm"), ("t5", "seq2seq")])
def test_a_batch_generates_what_each_prompt_does_alone(name: str, task: str, models: Callable[[str], Path]) -> None:
    """Padding is where it moves no token, and the tokenizer's own side stays as it was."""
    loaded = load_pretrained(task, str(models(name)))
    side = loaded.processor.padding_side
    prompts = ["the film", "a plot not bad very good", "good"]
    together = generate(loaded, prompts, batch_size=3, answering=Answering(8))
    assert together == [generate(loaded, [prompt], batch_size=1, answering=Answering(8))[0] for prompt in prompts]
    assert loaded.processor.padding_side == side


def test_of_a_prompt_that_is_too_long_the_end_is_read(models: Callable[[str], Path]) -> None:
    """Prompt and answer fit the model's 64 positions, of which the answer has 32 at most; short prompts stay whole."""
    loaded = load_pretrained("causal-lm", str(models("llama")))
    loaded.model.generation_config.eos_token_id = None
    words = [WORDS[number % 8] for number in range(100)]
    end = torch.tensor([loaded.processor(" ".join(words))["input_ids"][-56:]])
    wanted = loaded.model.generate(end, max_new_tokens=8, do_sample=False)[:, 56:]
    prompts = [" ".join(words), "the film"]
    answers = generate(loaded, prompts, batch_size=2, answering=Answering(8))
    assert answers[0] == loaded.processor.decode(wanted[0], skip_special_tokens=True)
    assert answers[1] == generate(loaded, prompts[1:], batch_size=1, answering=Answering(8))[0]
    seen: list[int] = []
    loaded.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    generate(loaded, prompts[:1], batch_size=1, answering=Answering(1000))
    assert sum(seen) < 64 + 1
    assert (seen[0], len(seen)) == (32, 32)


def test_samples_of_an_encoder_decoder_are_cut_as_its_predictions(models: Callable[[str], Path]) -> None:
    """A source may be longer than the model reads."""
    task = task_of("seq2seq", 6)
    loaded = load_pretrained(task.name, str(models("t5")))
    rows = [{"source": " ".join([*WORDS] * 3), "target": "x"}]
    (sample,) = task.samples(loaded, rows, 1)
    short: Any = {"batch_size": 1, "answering": Answering(24)}
    assert sample["after"] == task.predict(loaded, rows, **short)[0]["target"]
    assert sample["after"] == generate(loaded, [rows[0]["source"]], max_length=6, **short)[0]


def test_a_model_that_counts_its_positions_by_another_name_has_them_too(models: Callable[[str], Path]) -> None:
    """GPT-2 has ``n_positions`` in its config, beyond which it cannot read."""
    loaded = load_pretrained("causal-lm", str(models("llama")))
    small: dict[str, Any] = {"n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 20}
    model = GPT2LMHeadModel(GPT2Config(n_positions=24, **small))
    gpt = attrs.evolve(loaded, model=model)
    assert token_limit(gpt, 1000) == 24
    generate(gpt, [" ".join(WORDS * 10)], batch_size=1, answering=Answering(20))


def test_a_conversation_has_the_tokens_of_its_template_only(
    models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The template writes the first token itself; the tokenizer would add a second one."""
    loaded = load_pretrained("causal-lm", str(models("llama")))
    seen: list[torch.Tensor] = []

    def generated(input_ids: torch.Tensor, **options: object) -> torch.Tensor:
        seen.append(input_ids)
        return input_ids

    monkeypatch.setattr(loaded.model, "generate", generated)
    messages = [{"role": "user", "content": "the film"}]
    generate(loaded, [messages], batch_size=1)
    wanted = loaded.processor.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert seen[0][0].tolist() == wanted


def test_a_task_whose_package_is_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the extra that has it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"preference needs trl: pip install .*\[lm\]"):
        require_package("trl", "the task preference", "lm")
