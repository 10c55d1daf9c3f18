"""The quality benchmark: the splits of its tasks, a short run of each method, and its rows."""

import itertools
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.quality_needs import skip_without_what_quality_needs

skip_without_what_quality_needs()

from transformers import AutoModel  # noqa: E402

import tunerkit  # noqa: E402
from benchmarks.quality import (  # noqa: E402
    __main__ as command,
    grids,
    methods,
    minilm,
    parity,
    pool,
    rates,
    runs,
    store,
    tasks,
)
from benchmarks.quality.runs import Run, execute  # noqa: E402
from benchmarks.quality.sources import Examples, Tagged  # noqa: E402
from benchmarks.quality.tasks import Task  # noqa: E402
from tests.support.tiny_classifier import WORDS, save_tiny_classifier  # noqa: E402


def sentences(_: Path) -> Examples:
    texts = [" ".join(words) for words in itertools.islice(itertools.permutations(WORDS, 3), 80)]
    return Examples(tuple(texts), tuple("x" if "good" in text else "y" for text in texts))


def tagged(_: Path) -> Tagged:
    words = tuple(itertools.islice(itertools.permutations(WORDS, 3), 80))
    return Tagged(words, tuple(tuple(word[0] for word in row) for row in words))


TOY = {
    "toy": Task("toy", sentences, tasks.classify, 48, 16, 16, epochs=6),
    "toy tags": Task("toy tags", tagged, tasks.tag, 48, 16, 16, epochs=6),
}


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Replaces the real tasks by toy tasks on a tiny model; returns the cache folder."""
    folder = save_tiny_classifier(tmp_path / "tiny")
    AutoModel.from_pretrained(folder).save_pretrained(folder)  # without a head, as the real one
    for module in (runs, command, methods, parity, pool, rates):
        monkeypatch.setattr(module, "TASKS", TOY)
    monkeypatch.setattr(grids, "CURVES", tuple(TOY))
    monkeypatch.setattr(minilm, "folder", lambda cache: folder)
    return tmp_path


# Tasks


def test_a_split_is_the_same_every_time_and_no_row_is_in_two_parts(tmp_path: Path) -> None:
    """The sizes are as configured, digests differ between parts, and too few rows are an error with both counts."""
    parts = TOY["toy"].cut(tmp_path)
    assert [len(part) for part in parts] == [48, 16, 16]
    assert list(map(tasks.digest, parts)) == list(map(tasks.digest, TOY["toy"].cut(tmp_path)))
    assert len({*map(tasks.digest, parts)}) == 3
    texts = [text for part in parts if isinstance(part, Examples) for text in part.texts]
    assert len({*texts}) == 80
    with pytest.raises(tasks.TaskError, match="big: 81 rows are wanted and 80 are there"):
        Task("big", sentences, tasks.classify, 49, 16, 16, epochs=1).cut(tmp_path)


# Runs


@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize("task", TOY)
def test_each_method_trains_on_each_kind_of_task(task: str, method: str, toy: Path) -> None:
    """The row is valid JSON with scores, steps and trained parameters; repeating the run gives the same row."""
    run = Run(task, method, rank=2, learning_rate=5e-3, seed=1, tested=True)
    row, again = (execute(run, toy) for _ in range(2))
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert row["steps"] == TOY[task].steps == 18
    for part in ("validation", "test"):
        score: Any = row[part]
        assert 0 <= score["accuracy"] <= 1
        assert score["loss"] > 0
    for timed in (row, again):
        timed.pop("seconds")
        made: Any = timed.pop("made")
        assert made["torch"] == metadata.version("torch")  # of PyPI: without the "+cu" of torch.__version__
        assert made["date"].count("-") == 2
    assert row == again
    if method in (methods.LORA, methods.ADALORA):
        settled: Any = row["config"]
        config = tunerkit.structure(method, settled)
        assert config.settled() == config
    assert bool(row["ranks"]) == (method == methods.ADALORA)


def test_a_row_does_not_depend_on_the_arithmetic_of_the_machine(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of machines with and without bf16 are in one table: all are trained and scored in fp32."""
    run = Run("toy", methods.LORA, rank=2, learning_rate=5e-3, seed=1, tested=True)
    found = []
    for has_bf16 in (False, True):
        for question in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, question, lambda found=has_bf16: found)
        row = execute(run, toy)
        row.pop("seconds")
        row.pop("made")
        found.append((row, parity.losses("toy", rank=2, learning_rate=5e-3, steps=2, cache=toy)))
    assert found[0] == found[1]


def test_methods_differ_in_what_they_train(toy: Path) -> None:
    """Head, adapters or all weights; AdaLoRA ends at the parameters of LoRA's rank; PEFT's LoRA has as many as ours."""
    counts: dict[str, Any] = {
        method: execute(Run("toy", method, rank=2, learning_rate=5e-3, seed=1), toy)["parameters"]
        for method in (methods.HEAD_ONLY, methods.LORA, methods.PEFT_LORA, methods.FULL)
    }
    assert counts[methods.HEAD_ONLY] == 34  # 16 weights and a bias for either class
    assert counts[methods.LORA] == counts[methods.PEFT_LORA]
    assert counts[methods.HEAD_ONLY] < counts[methods.LORA] < counts[methods.FULL]
    row: Any = execute(Run("toy", methods.ADALORA, rank=2, learning_rate=5e-3, seed=1), toy)
    dearest, most = 16 + 32 + 1, counts[methods.LORA] + 2 * 12  # of a triplet; and LoRA's with all lambdas
    assert most - dearest < row["parameters"] <= most
    ranks = row["ranks"]
    assert len(ranks) == 12
    assert len({*ranks.values()}) > 1
    assert max(ranks.values()) <= 8


@pytest.mark.parametrize("method", methods.METHODS)
def test_heads_learn_at_a_separate_rate(method: str, toy: Path) -> None:
    """This holds under every wrapper; if only the head is trained, it has the run's rate."""
    model, _ = TOY["toy"].build(toy, seed=0)
    run = Run("toy", method, rank=2, learning_rate=5e-3, seed=1)
    prepared = methods.prepare(run, model, total_steps=18)
    optimizer = methods.adamw_with_heads(TOY["toy"], prepared.model, run.recipe)
    sizes = {group["lr"]: sum(p.numel() for p in group["params"]) for group in optimizer.param_groups}
    assert sum(sizes.values()) == prepared.count()
    assert sizes[5e-3 if method == methods.HEAD_ONLY else methods.HEAD_RATE] == 34


def test_the_two_loras_start_and_learn_alike(toy: Path) -> None:
    """Every loss of a dozen steps is equal, with dropout."""
    found = parity.losses("toy", rank=2, learning_rate=5e-3, steps=12, cache=toy)
    theirs, ours = found[methods.PEFT_LORA], found[methods.LORA]
    assert len(theirs) == len(ours) == 12
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert ours[-1] != pytest.approx(ours[0], abs=1e-3)


def test_peft_trains_with_its_regulariser_and_is_scored_without(toy: Path) -> None:
    """The regulariser's weight changes the training loss, but not the loss of the scored model."""
    model, parts = TOY["toy"].build(toy, seed=0)
    run = Run("toy", methods.PEFT_ADALORA, rank=2, learning_rate=5e-3, seed=1)
    prepared = methods.prepare(run, model, total_steps=18)
    inputs = parts.train.batch([0, 1])
    prepared.model.eval()
    scored = prepared.scored(**inputs).loss
    assert prepared.model(**inputs).loss > scored + 1e-3
    torch.testing.assert_close(prepared.scored(**inputs).loss, scored)


def test_a_run_is_identified_by_all_its_fields() -> None:
    """Changing any field changes the key, which does not depend on the process."""
    run = Run("movie-2", "lora", 8, 1e-3, 0)
    assert run.key == Run("movie-2", "lora", 8, 1e-3, 0, settings={}).key == "1cf3d3a41b450335"
    others = [
        Run("nyt-3", "lora", 8, 1e-3, 0),
        Run("movie-2", "lora", 8, 1e-3, 0, settings={"dropout": 0.1}),
        Run("movie-2", "lora", 8, 1e-3, 0, tested=True),
    ]
    assert len({run.key, *(other.key for other in others)}) == 4


# Rows


def test_rows_survive_a_writer_that_was_stopped(tmp_path: Path) -> None:
    """A truncated last line is no row, and the next row replaces it."""
    file = tmp_path / "rows" / "a.jsonl"
    assert store.read(file) == []
    store.append(file, {"key": "1"})
    with file.open("a", encoding="utf-8") as stream:
        stream.write('{"key": "2", "val')
    assert store.read(file) == [{"key": "1"}]
    store.append(file, {"key": "3"})
    assert store.read(file) == [{"key": "1"}, {"key": "3"}]
