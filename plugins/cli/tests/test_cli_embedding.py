"""The task ``embedding``: what is trained, saved, loaded and merged, on a random model of two layers."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import tunerkit
from tests.support.tiny_classifier import WORDS, save_tiny_classifier
from tests.support.tiny_models import save_tiny_t5
from tests.support.toy_growing import GrowingPlugin
from tests.support.train_command import check_resumed_after_ctrl_c, command, record_of, succeeded
from tunerkit.extras import install
from tunerkit_cli.folder import RunFolder
from tunerkit_cli.rows import DataError, Table
from tunerkit_cli.tasks import TaskError, task_of
from tunerkit_cli.tasks.formats import infer
from tunerkit_testing.registering import registered
from tunerkit_transformers.pretrained import Pretrained, load_pretrained

pytest.importorskip("sentence_transformers", reason="the task needs the extra [embedding]")
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

from tunerkit_cli.tasks.ranking import Distinct

TEXTS = ["good film", "the plot", "very bad"]


@pytest.fixture(autouse=True, scope="module")
def _toys() -> Iterator[None]:
    with registered(GrowingPlugin()):
        yield


def rows(count: int, *, negatives: bool) -> list[dict[str, str]]:
    """Anchors of two words, each with the words after them, and perhaps with those before."""
    pairs = [(one, other) for one in range(8) for other in range(8)]
    shifts = {"anchor": 0, "positive": 1, **({"negative": -1} if negatives else {})}
    return [
        {name: f"{WORDS[(one + by) % 8]} {WORDS[(other + by) % 8]}" for name, by in shifts.items()}
        for one, other in pairs[:count]
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of sentence-transformers, ``base``, and with ``pairs.jsonl`` and ``triplets.jsonl``.

    It pools other than by default, and has a further layer, and a prompt for queries.
    """
    folder = tmp_path_factory.mktemp("embedding")
    save_tiny_classifier(folder / "tiny")
    modules = [Transformer(str(folder / "tiny")), Pooling(16, "max"), Dense(16, 8)]
    SentenceTransformer(modules=modules, prompts={"query": "not "}).save_pretrained(str(folder / "base"))
    for name, negatives in (("pairs", False), ("triplets", True)):
        lines = (json.dumps(row) + "\n" for row in rows(40, negatives=negatives))
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def arguments_for(folder: Path, data: str, *more: object) -> list[str]:
    """The arguments, but ``--out``, of a run of 24 steps."""
    given: tuple[object, ...] = (
        "train",
        "--model",
        folder / "base",
        "--data",
        folder / f"{data}.jsonl",
        "--precision",
        "fp32",
    )
    given += ("--method", "toy-growing", "--config", "{every: 6, max_rank: 3}", "--epochs", 3, "--batch-size", 4)
    return [*map(str, (*given, "--lr", 0.02, *more))]


def vectors(loaded: Pretrained) -> Any:
    return np.array([each["anchor"] for each in task_of("embedding").predict(loaded, ANCHORS, batch_size=2)])


ANCHORS = [{"anchor": text} for text in TEXTS]


def test_the_adapter_is_in_what_is_saved_loaded_and_merged(folder: Path, tmp_path: Path) -> None:
    """Law: the run's folder, and the merged one in sentence-transformers, embed as the trained model does.

    The base embeds differently, and was worse. Its files decide about pooling and prompts.
    """
    out, merged, live, save = tmp_path / "out", tmp_path / "merged", [], RunFolder.save

    def kept(self: RunFolder, loaded: Pretrained) -> None:
        live.append(vectors(loaded))
        save(self, loaded)

    with mock.patch.object(RunFolder, "save", kept):
        done = succeeded(*arguments_for(folder, "triplets"), "--out", out)
    (trained,) = live
    assert (out / "adapter.safetensors").is_file()
    loaded = Pretrained(*tunerkit.from_folder(out), str(folder / "base"), None, ())
    assert np.abs(vectors(loaded) - trained).max() <= 1e-6
    succeeded("merge", out, "--out", merged)
    for name, least, most in (("merged", 0, 1e-6), ("base", 1e-2, 10)):
        other: Any = SentenceTransformer(str(merged if name == "merged" else folder / "base"))
        assert (other.prompts["query"], other[1].pooling_mode) == ("not ", "max")
        assert least <= np.abs(other.encode_query(TEXTS) - trained).max() <= most
    predicted = [json.loads(line) for line in succeeded("predict", out, *texts_options()).stdout.splitlines()]
    assert [each["row"] for each in predicted] == [1, 2, 3]
    assert np.abs(np.array([each["anchor"] for each in predicted]) - trained).max() <= 1e-6
    record = record_of(out)
    assert record["task"] == "embedding"
    assert (
        record["metrics"].keys()
        == {"accuracy", "mrr", "triplet_accuracy", "loss"}
        == record["baseline"]["metrics"].keys()
    )
    assert record["metrics"]["triplet_accuracy"] > record["baseline"]["metrics"]["triplet_accuracy"]
    assert f"base alone: accuracy {record['baseline']['metrics']['accuracy']:.4f}" in done.output
    assert "the base alone" in (out / "report.html").read_text("utf-8")


def texts_options() -> list[str]:
    return [part for text in TEXTS for part in ("--text", text)]


def test_a_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(folder: Path, tmp_path: Path) -> None:
    """Interrupted within an epoch and at its end; `tunerkit eval` then finds the metrics of the record."""
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps(row) + "\n" for row in rows(64, negatives=False)[40:]), encoding="utf-8")
    arguments = arguments_for(folder, "pairs", "--eval-data", held)
    whole = tmp_path / "whole"
    succeeded(*arguments, "--out", whole)
    check_resumed_after_ctrl_c(arguments, whole, tmp_path / "out", at=(7, 10))
    assert record_of(whole)["recipe"]["training"]["per_device_eval_batch_size"] == 4  # as that of training
    found = json.loads(succeeded("eval", whole, "--data", held).stdout)
    assert found == pytest.approx({"rows": 24, **record_of(whole)["metrics"]}, abs=1e-6)


def test_metrics_are_those_by_hand() -> None:
    """Of two anchors, the first has two positives, one of them the nearest; that of the second comes fourth."""
    a, b, near, far = [1.0, 0], [0.0, 1], [0.9, 0.1], [0.1, 0.9]
    predictions = np.array([[a, near, far], [a, far, b], [b, [0.5, 0.5], far]], dtype=np.float32)
    numbers = np.array([[0, 1, 2], [0, 3, 4], [5, 6, 2]])
    assert task_of("embedding").scores(predictions, numbers) == {
        "accuracy": 1 / 2,
        "mrr": pytest.approx((1 + 1 / 4) / 2),  # after b, and after far, which is two texts
        "triplet_accuracy": pytest.approx(2 / 3),
    }


def test_no_batch_has_a_text_twice() -> None:
    """It would be a wrong answer to its own anchor; each row is drawn once, in the same order after resuming."""
    import datasets

    given = datasets.Dataset.from_list([{"anchor": f"q{n % 4}", "positive": f"a{n}", "labels": [n]} for n in range(16)])
    orders = []
    for epoch in (0, 1, 1):
        sampler = Distinct(given, 4, 0, of_pairs=True)
        sampler.set_epoch(epoch)
        orders.append([*sampler])
    assert orders[0] != orders[1] == orders[2]
    assert sorted(orders[0]) == [*range(16)]
    for start in range(0, 16, 4):
        assert len({n % 4 for n in orders[0][start : start + 4]}) == 4


def test_a_pair_is_never_alone_in_a_batch() -> None:
    """It would teach nothing. Rows that share a text with the others come last, so that they are not with them."""
    import datasets

    texts = [("a", "b"), ("a", "c"), ("d", "b")]  # the first one goes with none of the others
    rows = [{"anchor": anchor, "positive": positive, "labels": [0]} for anchor, positive in texts]
    pairs, triplets = (Distinct(datasets.Dataset.from_list(rows), 2, 0, of_pairs=each) for each in (True, False))
    for epoch in range(4):
        pairs.set_epoch(epoch)
        triplets.set_epoch(epoch)
        assert (len(pairs), {*pairs}) == (2, {1, 2})
        assert (len(triplets), [*triplets][2:]) == (3, [0])
    assert len(Distinct(datasets.Dataset.from_list(rows), 4, 0, of_pairs=True)) == 3


def table(*rows: dict[str, Any]) -> Table:
    return Table("data", tuple(rows[0]), rows)


def test_pairs_and_triplets_are_recognized_and_what_fits_two_tasks_is_named() -> None:
    """Queries with positives too. Pairs with a score are refused, whoever says what they are."""
    pair = {"anchor": "x", "positive": "y"}
    for row in (pair, {**pair, "negative": "z"}, {"query": "x", "positive": "y"}):
        assert infer(table(row), {}) == "embedding"
    with pytest.raises(TaskError, match="which fit embedding and text-classification; say which one it is"):
        infer(table({**pair, "text": "x", "label": "a"}), {})
    with pytest.raises(DataError, match="has 'score', and embedding takes each positive for one that belongs to"):
        task_of("embedding").rows(table({**pair, "score": 0.1}), {})


def test_what_predicts_needs_one_column_alone() -> None:
    """Anchors, positives or both; with none of them, the anchor is asked for."""
    task = task_of("embedding")
    for row in ({"anchor": "x"}, {"positive": "x"}, {"anchor": "x", "positive": "y"}):
        assert task.rows(table(row), {}, predicting=True) == [row]
    with pytest.raises(DataError, match="embedding needs a column 'anchor'"):
        task.rows(table({"text": "x"}), {}, predicting=True)


def test_a_missing_package_is_one_line_that_names_the_extra(folder: Path, tmp_path: Path) -> None:
    """Nothing is written."""
    find = importlib.util.find_spec
    hidden = lambda name, *rest: None if name == "sentence_transformers" else find(name, *rest)  # noqa: E731
    with mock.patch("importlib.util.find_spec", hidden):
        done = command(*arguments_for(folder, "pairs"), "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1].endswith(
        f"the task embedding needs sentence_transformers: {install('embedding')}"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "1"], "per_device_train_batch_size: pairs need at least 2, got 1"),
        (["--model", "t5"], "is a T5ForConditionalGeneration (model type t5), not an encoder of texts"),
        (["--set", "class_weights=balanced"], "class_weights: embedding has none"),
    ],
)
def test_what_cannot_be_trained_is_refused(options: list[str], message: str, folder: Path, tmp_path: Path) -> None:
    """In one line, before the first step."""
    given = [str(save_tiny_t5(tmp_path / "t5")) if each == "t5" else each for each in options]
    done = command(*arguments_for(folder, "pairs", *given), "--out", tmp_path / "out")
    assert done.exit_code == 2, done.output
    assert message in done.stderr


def test_a_pooler_without_weights_is_left_out(folder: Path, tmp_path: Path) -> None:
    """Nothing reads it, so it would be saved as it was drawn; one of the checkpoint stays."""
    loaded = load_pretrained("embedding", str(folder / "tiny"))
    assert loaded.model.pooler is not None
    loaded.model.pooler = None
    loaded.model.save_pretrained(tmp_path)
    loaded.processor.save_pretrained(tmp_path)
    assert load_pretrained("embedding", str(tmp_path)).model.pooler is None
