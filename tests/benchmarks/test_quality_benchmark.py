"""The quality benchmark: the splits of its tasks, a short run of each method, and its rows."""

import concurrent.futures
import io
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch

from tests.support.quality_needs import skip_without_what_quality_needs

skip_without_what_quality_needs()

from filelock import FileLock  # noqa: E402
from PIL import Image  # noqa: E402
from rich.console import Console  # noqa: E402
from transformers import AutoModel, AutoTokenizer, LlamaConfig  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import tunerkit  # noqa: E402
from benchmarks.quality import (  # noqa: E402
    __main__ as command,
    ablation,
    definitions,
    grids,
    images,
    methods,
    minilm,
    parity,
    pool,
    rates,
    runs,
    sources,
    store,
    tagging,
    tasks,
)
from benchmarks.quality.batches import IGNORED  # noqa: E402
from benchmarks.quality.runs import Run, execute  # noqa: E402
from benchmarks.quality.sources import Examples, Tagged  # noqa: E402
from benchmarks.quality.tasks import Task  # noqa: E402
from tests.support.quality_rows import row_of  # noqa: E402
from tests.support.tiny_classifier import WORDS, save_tiny_classifier  # noqa: E402
from tunerkit_adalora import AdaLoraConfig  # noqa: E402


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


def test_every_task_takes_three_hundred_steps_or_more() -> None:
    """Shorter trainings say little about a schedule that is a share of the steps."""
    assert all(tasks.TASKS[name].steps >= 300 for name in tasks.CURVES)
    assert {*tasks.TASKS} - {*tasks.CURVES} == {"definitions"}  # the language model's, a step of which takes seconds


@pytest.mark.parametrize(
    ("tag", "first"),
    [("nn-tl", "nn"), ("ppss+hvd", "ppss"), ("bedz*", "bedz"), ("fw-nn", "fw"), ("--", "--"), ("*", "*")],
)
def test_joined_tags_are_cut_to_their_first_part(tag: str, first: str) -> None:
    """Punctuation is kept whole."""
    assert sources.first_part(tag) == first


def test_a_word_is_labelled_at_its_first_token_only(toy: Path) -> None:
    """Special tokens, further tokens of a word, padding and tags that are not in the training rows are ignored."""
    assert tagging.first_tokens([None, 0, 0, 1, None], [5, 7]) == (IGNORED, 5, IGNORED, 7, IGNORED)
    _, parts = TOY["toy tags"].build(toy, seed=0)
    batch = parts.train.batch([0, 1])
    assert batch["labels"].shape == batch["input_ids"].shape == (2, 5)
    assert (batch["labels"] == IGNORED).sum(1).tolist() == [2, 2]
    rows = tagging.TokenRows(ids=((1,), (1, 1)), labels=((3,), (4, 5)), padding=0)
    assert rows.batch([0, 1])["labels"].tolist() == [[3, IGNORED], [4, 5]]


def test_images_are_resized_and_scaled() -> None:
    """Grey from 0 to 255 becomes three channels from -1 to 1."""
    pixels = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    pixels[1] = 255
    found = images.ImageRows(images.Images(pixels, torch.tensor([3, 4])))
    batch = found.batch([1, 0])
    assert batch["pixels"].shape == (2, 3, images.SIZE, images.SIZE)
    assert batch["pixels"].unique().tolist() == [-1, 1]
    assert batch["labels"].tolist() == [4, 3]
    assert len(found.lengths) == 2


@pytest.mark.parametrize("frozen", [True, False])
def test_normalisation_keeps_its_statistics_in_training(frozen: bool) -> None:
    """Its weight may be trained or not, and the rest of the model is in training mode."""
    norm = torch.nn.BatchNorm2d(2)
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), norm, torch.nn.Flatten(1))
    classifier = images.ImageClassifier(backbone.requires_grad_(not frozen))
    assert classifier.train() is classifier
    classifier(torch.randn(4, 3, 1, 1), torch.tensor([0, 1, 0, 1]))
    assert norm.running_mean is not None
    assert torch.equal(norm.running_mean, torch.zeros(2))
    assert norm.running_var is not None
    assert torch.equal(norm.running_var, torch.ones(2))
    assert classifier.training
    assert norm.weight.requires_grad != frozen
    assert not classifier.eval().training


def test_a_file_of_images_is_read() -> None:
    """The shape comes before the bytes, as big-endian numbers."""
    content = bytes([0, 0, 8, 2]) + (2).to_bytes(4, "big") + (3).to_bytes(4, "big") + bytes(range(6))
    assert images.idx(content).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_images_that_are_lines_of_one_image_are_read() -> None:
    """Pixels run from the upper left, one row of 32 after the other."""
    lines = np.random.default_rng(0).integers(0, 256, (3, 1024, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(lines).save(file, "PNG")
    found = images.strips(file.getvalue())
    assert found.shape == (3, 3, 32, 32)
    assert found[2, :, 1, 5].tolist() == lines[2, 32 + 5].tolist()
    rows = images.ImageRows(images.Images(found, torch.tensor([0, 1, 2])))
    assert rows.batch([2])["pixels"].shape == (1, 3, images.SIZE, images.SIZE)


def test_a_definition_is_the_target_and_its_word_is_the_prompt(toy: Path) -> None:
    """Labels begin and end with the definition; padding has none."""
    tokenizer = AutoTokenizer.from_pretrained(toy / "tiny")
    tokenizer.eos_token = "[SEP]"
    rows = definitions.encode(tokenizer, Examples(("good film", "a very bad plot"), ("plot", "the")), max_length=64)
    batch = rows.batch([0, 1])
    for row, length in enumerate(rows.lengths):
        told = batch["labels"][row] != IGNORED
        assert torch.equal(batch["labels"][row][told], batch["input_ids"][row][told])
        assert told.nonzero().flatten().tolist() == list(range(told.int().argmax(), length))


def test_logits_are_aligned_with_the_token_that_they_predict() -> None:
    """Accuracy and loss therefore use the same prediction."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = definitions.NextToken(config)
    ids = torch.randint(0, 11, (2, 5))
    out = model(input_ids=ids, labels=ids)
    told = torch.nn.functional.cross_entropy(out.logits[:, 1:].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, told)


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
    ranks: Any = execute(Run("toy", methods.ADALORA, rank=2, learning_rate=5e-3, seed=1), toy)["ranks"]
    assert len(ranks) == 12
    assert len({*ranks.values()}) > 1
    assert max(ranks.values()) <= 8


@pytest.mark.parametrize(
    ("rank", "settings", "expected"),
    [
        (8, {}, (12, 2.0, False)),
        (1, {}, (8, 2 / 8, True)),
        (8, {"exact_svd": True}, (12, 16 / 12, True)),
        (1, {"gamma": 0.1}, (2, 2.0, False)),
        (2, {"init_rank": 6, "alpha": 3.0}, (6, 3 / 6, True)),
    ],
)
def test_adalora_starts_as_its_target_rank_implies(
    toy: Path, rank: int, settings: dict[str, Any], expected: tuple[int, float, bool]
) -> None:
    """Settings equal those of a user who gives only the rank, except that the budget is counted in parameters."""
    model, _ = TOY["toy"].build(toy, 0)
    prepared = methods.prepare(Run("toy", methods.ADALORA, rank, 1e-3, 0, settings), model, 18)
    config = tunerkit.tuner(prepared.model).config
    assert isinstance(config, AdaLoraConfig)
    assert (config.initial_rank, config.scale, config.in_svd_form) == expected


def test_adalora_ends_at_no_more_parameters_than_lora_and_the_lambdas(toy: Path) -> None:
    """It also has at most one triplet less; both have the head's 34 parameters in addition."""
    lora, adalora = (
        execute(Run("toy", method, rank=2, learning_rate=5e-3, seed=1), toy)
        for method in (methods.LORA, methods.ADALORA)
    )
    dearest, lambdas = 16 + 32 + 1, 2 * 12
    assert lora["parameters"] + lambdas - dearest < adalora["parameters"] <= lora["parameters"] + lambdas  # type: ignore[operator]


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


@pytest.mark.parametrize("change", ablation.CHANGES)
def test_every_change_is_a_setting_that_trains(change: str, toy: Path) -> None:
    """It ends at no more parameters than LoRA's plus one λ per triplet, if the budget is counted in parameters."""
    run = Run("toy", methods.ADALORA, ablation.RANK, 5e-3, 0, ablation.settings_of(change))
    lora = execute(attrs.evolve(run, method=methods.LORA, settings={}), toy)
    dearer = 12 * (48 - 32) if run.settings.get("budget_unit") == "rank" else 0
    assert execute(run, toy)["parameters"] <= lora["parameters"] + 12 + dearer  # type: ignore[operator]


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


def test_a_grid_resumes_where_it_was_stopped(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit stops early, the second call makes the rest and repeats none; unknown names are an error."""
    monkeypatch.setattr(grids, "ENDS", (1,))
    monkeypatch.setattr(grids, "BETWEEN", ())
    made: list[Run] = []

    def make(left: list[Run], file: Path, jobs: int, console: object) -> None:
        made.extend(left)
        for run in left:
            store.append(file, row_of(run, 1 - abs(run.learning_rate - 2e-3)))

    monkeypatch.setattr(command, "make", make)
    arguments = ["run", "--grid", "headroom", "--rows", str(toy / "rows")]
    for extra, count in ((["--limit", "3"], 3), ([], 10), ([], 10)):
        result = CliRunner().invoke(command.app, [*arguments, *extra])
        assert result.exit_code == 0, result.output
        assert len(made) == len({run.key for run in made}) == count  # two tasks, three rates, two more seeds
    for wrong, message in ((["--grid", "hedroom"], "there are: headroom"), (["--task", "toys"], "there are: toy, toy")):
        result = CliRunner().invoke(command.app, [*arguments, *wrong])
        assert result.exit_code == 2
        assert message in result.output


def test_one_grid_is_run_once_at_a_time(tmp_path: Path) -> None:
    """A second call at the same time would repeat the same runs, so it is an error."""
    with FileLock(tmp_path / "headroom.lock"):
        result = CliRunner().invoke(command.app, ["run", "--grid", "headroom", "--rows", str(tmp_path)])
    assert result.exit_code == 2
    assert "'headroom' is being run already" in result.output


class Threads(concurrent.futures.ThreadPoolExecutor):
    """Replaces processes, which would not see a test's patches."""

    shutting: threading.Event

    def __init__(self, jobs: int, **_: object) -> None:
        super().__init__(jobs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.shutting.set()
        super().shutdown(wait, cancel_futures=cancel_futures)


def test_a_failed_run_stops_the_grid_and_loses_no_running_one(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other run finishes after the failure is known, and its row is written."""
    failing, other = (Run("toy", "lora", 1, 1e-3, seed) for seed in (0, 1))
    running = threading.Event()

    def execute(run: Run, _: Path) -> store.Row:
        if run == failing:
            assert running.wait(1800)  # otherwise the other run might not have begun, and would be cancelled
            raise OSError("no space left")
        running.set()
        assert Threads.shutting.wait(1800)
        return row_of(run, 1.0)

    monkeypatch.setattr(Threads, "shutting", threading.Event(), raising=False)
    monkeypatch.setattr(pool, "execute", execute)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which it sets, and is taken back so
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Threads)
    with pytest.raises(OSError, match="no space left"):
        pool.make([failing, other], toy / "rows.jsonl", 2, Console(quiet=True))
    assert [row["key"] for row in store.read(toy / "rows.jsonl")] == [other.key]


_POOL = """
import concurrent.futures, multiprocessing, os, time
from benchmarks.quality.pool import end_with_parent

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 7200)
    time.sleep(7200)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="processes are looked up in /proc")
def test_workers_end_with_the_command_that_is_killed(tmp_path: Path) -> None:
    """Nobody would write their rows, and the next call would repeat the runs at the same time."""
    script = tmp_path / "pool.py"
    script.write_text(_POOL, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        process.kill()
    deadline = time.monotonic() + 1800  # usually below a second; a busy machine takes longer
    while is_running(worker):
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"
