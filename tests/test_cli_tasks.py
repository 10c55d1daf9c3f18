"""The tasks: from rows to predictions, on random models of two layers."""

import importlib.util
import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch

# Imports after a statement: without the extra this file is skipped, not broken.
for _module in ("datasets", "pyarrow", "sklearn", "transformers", "typer", "yaml"):
    pytest.importorskip(_module, reason="the command needs the extra [cli]")

import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

import tunerkit  # noqa: E402
from tests.tiny_classifier import WORDS, save_tiny_classifier  # noqa: E402
from tests.tiny_models import SIDE, save_tiny_llama, save_tiny_roberta, save_tiny_t5, save_tiny_vit  # noqa: E402
from tunerkit.cli.recipes.recipe import Recipe  # noqa: E402
from tunerkit.cli.rows.reading import DataError, Table, read_table  # noqa: E402
from tunerkit.cli.running.data import prepare_data  # noqa: E402
from tunerkit.cli.running.hardware import computing_in  # noqa: E402
from tunerkit.cli.running.record import model_facts, write_record  # noqa: E402
from tunerkit.cli.running.run import prepare, train  # noqa: E402
from tunerkit.cli.tasks import TASKS, TaskError, task_of  # noqa: E402
from tunerkit.cli.tasks.answering import Answering  # noqa: E402
from tunerkit.cli.tasks.base import MissingPackageError, require_package  # noqa: E402
from tunerkit.cli.tasks.classifying import classification_scores, confusion_of  # noqa: E402
from tunerkit.cli.tasks.generating import GenerationTask, generate  # noqa: E402
from tunerkit.cli.tasks.infer import infer  # noqa: E402
from tunerkit.cli.tasks.texts import token_limit  # noqa: E402
from tunerkit.integrations.output_folder import load_run, read_run  # noqa: E402
from tunerkit.integrations.pretrained import load_pretrained  # noqa: E402
from tunerkit.report.record import GREATEST  # noqa: E402
from tunerkit.testing.registering import registered  # noqa: E402
from tunerkit.testing.toy_methods import LowRankPlugin  # noqa: E402

pytestmark = pytest.mark.core_only

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


def translated(number: int, rng: random.Random) -> dict[str, Any]:
    return {"source": ("the film", "a plot")[number % 2], "target": ("very good", "not bad")[number % 2]}


EPOCH = 4  # steps, each of which logs its loss: 32 of 40 rows in batches of 8
CASES = {
    "text-classification": Case("text-classification", "bert", classified),
    "text pairs": Case("text-classification", "bert", paired),
    "regression": Case("regression", "bert", rated, inferred=False, epochs=25),
    "multi-label": Case("multi-label", "bert", labelled),
    "token-classification": Case("token-classification", "bert", tagged),
    "causal-lm, completions": Case("causal-lm", "llama", answered, "trl"),
    "causal-lm, messages": Case("causal-lm", "llama", said, "trl"),
    "causal-lm, texts": Case("causal-lm", "llama", written, "trl"),
    "preference": Case("preference", "llama", preferred, "trl"),
    "seq2seq": Case("seq2seq", "t5", translated),
    "image-classification": Case("image-classification", "vit", classified, "PIL"),
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


# TRL is in the extra [lm], which the environment without plugins does not have.
EVERYWHERE = {name: [pytest.mark.everywhere] if case.needs == "trl" else [] for name, case in CASES.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=marks) for name, marks in EVERYWHERE.items()])
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
            "learning_rate": 0.05,
            "per_device_train_batch_size": 8,
            "save_strategy": "no",
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
        trained = train(session, QUIET, resume=False)
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
        write_record(
            Path("out"),
            {
                "version": 1,
                "task": task.name,
                "model": model_facts(session.loaded, session.trainer.args.seed),
                "labels": list(rows.labels),
            },
        )
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
    """The metrics of a task for what a trainer's prediction returned, which are those that it logs."""
    outputs = {"label_ids": np.array(truth), "predictions": np.array(predictions)}
    trainer = SimpleNamespace(predict=lambda dataset: SimpleNamespace(**outputs, metrics={"test_loss": 0.5}))
    results = task_of(task).evaluate(trainer, None).metrics
    assert {**task_of(task).compute_metrics(SimpleNamespace(**outputs)), "loss": 0.5} == results
    return results


def test_accuracy_f1_and_confusion_are_those_by_hand() -> None:
    """Class 0: 2 of 3 found, 2 of 3 right; class 1: 2 of 2, 2 of 3 right; class 2: never predicted, so its F1 is 0."""
    truth, logits = np.array([0, 0, 0, 1, 1, 2]), np.eye(3)[[0, 0, 1, 1, 1, 0]]
    assert confusion_of(logits, truth) == [[2, 1, 0], [0, 2, 0], [1, 0, 0]]
    assert classification_scores(logits, truth) == {
        "accuracy": pytest.approx(4 / 6),
        "f1": pytest.approx((2 / 3 + 0.8 + 0) / 3),
    }


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
        with pytest.raises(DataError, match=rf"'{prompt}' and '{second}', .*join .*set columns.prompt to {prompt} in"):
            task_of(task).rows(rows, {})
        with pytest.raises(DataError, match=rf"to leave '{second}' out, remove that column"):
            task_of(task).rows(rows, {}, predicting=True, renaming=False)
        assert task_of(task).rows(rows, {"prompt": prompt})[0]["prompt"] == "x"
        assert task_of(task).rows(table({"prompt": "x", second: "y", **rest}), {})[0]["prompt"] == "x"


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
    """A class whose only row is held out is a class all the same; the split is not to blame for its data."""
    rows = [f"{word},{word}\n" for word in ("good", "bad") * 10]
    for place in range(len(rows)):
        path = tmp_path / "data.csv"
        path.write_text("".join(["text,label\n", *rows[:place], "film,rare\n", *rows[place:]]))
        _, data = prepare_data(Recipe(data=str(path)), QUIET)
        assert data.labels == ("bad", "good", "rare")


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
    encoded = task.encode([row], loaded)  # [CLS] good - film bad plot [SEP]
    assert encoded["labels"][0] == [-100, 1, -100, -100, 0, 1, -100]
    (found,) = task.predict(loaded, [row], batch_size=1)
    assert found["tokens"] == words[:4]
    assert [tag is None for tag in found["tags"]] == [False, True, False, False]


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
    (sample,) = task.samples(loaded, rows)
    assert sample["answer"] == task.predict(loaded, rows, batch_size=1)[0]["target"]
    assert sample["answer"] == generate(loaded, [rows[0]["source"]], batch_size=1, max_length=6)[0]


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
    with pytest.raises(MissingPackageError, match=r'preference needs trl: pip install "tunerkit\[lm\]"'):
        require_package("trl", "preference", "lm")
