"""The benchmark of quality: its tasks' cuts, its rows, its tables, and a short run of each method."""

import concurrent.futures
import io
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch

for _module in (
    "filelock",
    "matplotlib",
    "peft",
    "PIL",
    "timm",
    "transformers",
    "typer",
    "rich",
    "platformdirs",
    "tunerkit_lora",
    "tunerkit_adalora",
):
    pytest.importorskip(_module, reason=f"the benchmark needs {_module}")

from filelock import FileLock  # noqa: E402
from matplotlib.container import ErrorbarContainer  # noqa: E402
from PIL import Image  # noqa: E402
from rich.console import Console  # noqa: E402
from transformers import AutoModel, AutoTokenizer, LlamaConfig  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import tunerkit  # noqa: E402
from benchmarks.quality import __main__ as command  # noqa: E402
from benchmarks.quality import (  # noqa: E402
    ablation,
    contest,
    definitions,
    grids,
    images,
    methods,
    parity,
    plots,
    pool,
    rates,
    runs,
    scores,
    sources,
    store,
    tables,
    tagging,
    tasks,
)
from benchmarks.quality.runs import Run, execute  # noqa: E402
from benchmarks.quality.sources import Tagged  # noqa: E402
from benchmarks.quality.tasks import Task  # noqa: E402
from tests.tiny_classifier import WORDS, save_tiny_classifier  # noqa: E402
from tunerkit.cli import assets, training  # noqa: E402
from tunerkit.cli.data import Examples  # noqa: E402
from tunerkit.cli.training import IGNORED  # noqa: E402
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
    """The toy tasks in place of the real ones, on a tiny model; the cache folder."""
    folder = save_tiny_classifier(tmp_path / "tiny")
    AutoModel.from_pretrained(folder).save_pretrained(folder)  # without a head, as the real one
    for module in (runs, command, methods, parity, pool, rates):
        monkeypatch.setattr(module, "TASKS", TOY)
    monkeypatch.setattr(grids, "CURVES", tuple(TOY))
    monkeypatch.setattr(assets, "demo_model", lambda cache: folder)
    monkeypatch.setattr(pool, "demo_model", lambda cache: folder)
    return tmp_path


# Tasks


def test_a_cut_is_the_same_every_time_and_no_row_is_in_two_parts(tmp_path: Path) -> None:
    """The sizes are as said, the digests tell parts apart, and too few rows are an error that counts them."""
    parts = TOY["toy"].cut(tmp_path)
    assert [len(part) for part in parts] == [48, 16, 16]
    assert list(map(tasks.digest, parts)) == list(map(tasks.digest, TOY["toy"].cut(tmp_path)))
    assert len({*map(tasks.digest, parts)}) == 3
    texts = [text for part in parts if isinstance(part, Examples) for text in part.texts]
    assert len({*texts}) == 80
    with pytest.raises(sources.TaskError, match="big: 81 rows are wanted and 80 are there"):
        Task("big", sentences, tasks.classify, 49, 16, 16, epochs=1).cut(tmp_path)


def test_every_task_takes_three_hundred_steps_or_more() -> None:
    """Shorter trainings say little of a schedule that is a share of them."""
    assert all(tasks.TASKS[name].steps >= 300 for name in tasks.CURVES)
    assert {*tasks.TASKS} - {*tasks.CURVES} == {"definitions"}  # the language model's, a step of which takes seconds


@pytest.mark.parametrize(
    ("tag", "first"),
    [("nn-tl", "nn"), ("ppss+hvd", "ppss"), ("bedz*", "bedz"), ("fw-nn", "fw"), ("--", "--"), ("*", "*")],
)
def test_joined_tags_are_cut_to_their_first_part(tag: str, first: str) -> None:
    """Punctuation is whole."""
    assert sources.first_part(tag) == first


def test_a_word_is_told_by_its_first_token_alone(toy: Path) -> None:
    """Special tokens, further tokens of a word and padding are ignored, so are tags that training has not."""
    assert tagging.first_tokens([None, 0, 0, 1, None], [5, 7]) == (IGNORED, 5, IGNORED, 7, IGNORED)
    _, parts = TOY["toy tags"].build(toy, seed=0)
    batch = parts.train.batch([0, 1], torch.device("cpu"))
    assert batch["labels"].shape == batch["input_ids"].shape == (2, 5)
    assert (batch["labels"] == IGNORED).sum(1).tolist() == [2, 2]
    rows = tagging.TokenRows(ids=((1,), (1, 1)), labels=(), padding=0, token_labels=((3,), (4, 5)))
    assert rows.label_tensor([0, 1], 2).tolist() == [[3, IGNORED], [4, 5]]


def test_pictures_are_stretched_and_scaled() -> None:
    """Grey from 0 to 255 becomes three channels from -1 to 1."""
    pixels = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    pixels[1] = 255
    found = images.ImageRows(images.Images(pixels, torch.tensor([3, 4])))
    batch = found.batch([1, 0], torch.device("cpu"))
    assert batch["pixels"].shape == (2, 3, images.SIZE, images.SIZE)
    assert batch["pixels"].unique().tolist() == [-1, 1]
    assert batch["labels"].tolist() == [4, 3]
    assert len(found.lengths) == 2


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_normalisation_keeps_its_statistics_in_training(frozen: bool) -> None:
    """One that is trained moves them, and the rest is in training mode either way."""
    norm = torch.nn.BatchNorm2d(2)
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), norm, torch.nn.Flatten(1))
    classifier = images.ImageClassifier(backbone.requires_grad_(not frozen))
    assert classifier.train() is classifier
    classifier(torch.randn(4, 3, 1, 1), torch.tensor([0, 1, 0, 1]))
    assert norm.running_mean is not None
    assert torch.equal(norm.running_mean, torch.zeros(2)) == frozen
    assert classifier.training
    assert not classifier.eval().training


def test_a_file_of_pictures_is_read() -> None:
    """Its shape stands before its bytes, big end first."""
    content = bytes([0, 0, 8, 2]) + (2).to_bytes(4, "big") + (3).to_bytes(4, "big") + bytes(range(6))
    assert images.idx(content).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_pictures_that_are_lines_of_one_picture_are_read() -> None:
    """Pixel by pixel from the upper left, a row of 32 after the other."""
    lines = np.random.default_rng(0).integers(0, 256, (3, 1024, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(lines).save(file, "PNG")
    found = images.strips(file.getvalue())
    assert found.shape == (3, 3, 32, 32)
    assert found[2, :, 1, 5].tolist() == lines[2, 32 + 5].tolist()
    rows = images.ImageRows(images.Images(found, torch.tensor([0, 1, 2])))
    assert rows.batch([2], torch.device("cpu"))["pixels"].shape == (1, 3, images.SIZE, images.SIZE)


def test_a_definition_is_told_and_its_word_is_given(toy: Path) -> None:
    """The labels begin where the definition does, end with it, and padding has none."""
    tokenizer = AutoTokenizer.from_pretrained(toy / "tiny")
    tokenizer.eos_token = "[SEP]"
    rows = definitions.encode(tokenizer, Examples(("good film", "a very bad plot"), ("plot", "the")), max_length=64)
    batch = rows.batch([0, 1], torch.device("cpu"))
    for row, length in enumerate(rows.lengths):
        told = batch["labels"][row] != IGNORED
        assert torch.equal(batch["labels"][row][told], batch["input_ids"][row][told])
        assert told.nonzero().flatten().tolist() == list(range(told.int().argmax(), length))


def test_logits_stand_at_the_token_that_they_tell() -> None:
    """So that accuracy and loss look at the same prediction."""
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
    """A row that JSON holds, with scores, the steps taken, and what was trained; the same run gives the same row."""
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
    assert row == again
    if method in (methods.LORA, methods.ADALORA):
        settled: Any = row["config"]
        config = tunerkit.structure(method, settled)
        assert config.settled() == config
    assert bool(row["ranks"]) == (method == methods.ADALORA)


def test_a_row_does_not_depend_on_the_arithmetic_of_the_machine(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of machines with and without bf16 stand in one table: all are trained and scored in fp32."""
    run = Run("toy", methods.LORA, rank=2, learning_rate=5e-3, seed=1, tested=True)
    found = []
    for has_bf16 in (False, True):
        monkeypatch.setattr(training, "has_bf16", lambda _, found=has_bf16: found)
        row = execute(run, toy)
        row.pop("seconds")
        found.append((row, parity.losses("toy", rank=2, learning_rate=5e-3, steps=2, cache=toy)))
    assert found[0] == found[1]


def test_methods_differ_in_what_they_train(toy: Path) -> None:
    """Head, adapters, all; AdaLoRA ends at the parameters of LoRA's rank; PEFT's LoRA counts as ours."""
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
def test_adalora_starts_as_its_rank_at_the_end_would_have_it(
    toy: Path, rank: int, settings: dict[str, Any], expected: tuple[int, float, bool]
) -> None:
    """As a user's would who gives the rank alone, but that the budget is counted in parameters."""
    model, _ = TOY["toy"].build(toy, 0)
    prepared = methods.prepare(Run("toy", methods.ADALORA, rank, 1e-3, 0, settings), model, 18)
    config = tunerkit.tuner(prepared.model).config
    assert isinstance(config, AdaLoraConfig)
    assert (config.initial_rank, config.scale, config.in_svd_form) == expected


def test_adalora_ends_at_no_more_parameters_than_lora_and_the_lambdas(toy: Path) -> None:
    """And at no fewer than one triplet less; the head's 34 stand beside both."""
    lora, adalora = (
        execute(Run("toy", method, rank=2, learning_rate=5e-3, seed=1), toy)
        for method in (methods.LORA, methods.ADALORA)
    )
    dearest, lambdas = 16 + 32 + 1, 2 * 12
    assert lora["parameters"] + lambdas - dearest < adalora["parameters"] <= lora["parameters"] + lambdas  # type: ignore[operator]


@pytest.mark.parametrize("method", methods.METHODS)
def test_heads_learn_at_a_rate_of_their_own(method: str, toy: Path) -> None:
    """Under every wrapping; where nothing else is trained, at the run's."""
    model, _ = TOY["toy"].build(toy, seed=0)
    run = Run("toy", method, rank=2, learning_rate=5e-3, seed=1)
    prepared = methods.prepare(run, model, total_steps=18)
    optimizer = methods.adamw_with_heads(TOY["toy"], prepared.model, run.recipe)
    sizes = {group["lr"]: sum(p.numel() for p in group["params"]) for group in optimizer.param_groups}
    assert sum(sizes.values()) == prepared.count()
    assert sizes[5e-3 if method == methods.HEAD_ONLY else methods.HEAD_RATE] == 34


def test_the_two_loras_start_and_learn_alike(toy: Path) -> None:
    """Every loss of a dozen steps, dropout and all."""
    found = parity.losses("toy", rank=2, learning_rate=5e-3, steps=12, cache=toy)
    theirs, ours = found[methods.PEFT_LORA], found[methods.LORA]
    assert len(theirs) == len(ours) == 12
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert ours[-1] != pytest.approx(ours[0], abs=1e-3)


def test_peft_trains_with_its_regulariser_and_is_scored_without(toy: Path) -> None:
    """Its weight moves the training loss, and not the loss of the model that is scored."""
    model, parts = TOY["toy"].build(toy, seed=0)
    run = Run("toy", methods.PEFT_ADALORA, rank=2, learning_rate=5e-3, seed=1)
    prepared = methods.prepare(run, model, total_steps=18)
    inputs = parts.train.batch([0, 1], torch.device("cpu"))
    prepared.model.eval()
    scored = prepared.scored(**inputs).loss
    assert prepared.model(**inputs).loss > scored + 1e-3
    torch.testing.assert_close(prepared.scored(**inputs).loss, scored)


def test_a_run_is_known_by_all_that_it_is_told() -> None:
    """Any field changes the key, which does not depend on the process."""
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
    """A last line that was cut off is no row, and the next row takes its place."""
    file = tmp_path / "rows" / "a.jsonl"
    assert store.read(file) == []
    store.append(file, {"key": "1"})
    with file.open("a", encoding="utf-8") as stream:
        stream.write('{"key": "2", "val')
    assert store.read(file) == [{"key": "1"}]
    store.append(file, {"key": "3"})
    assert store.read(file) == [{"key": "1"}, {"key": "3"}]


def test_a_grid_goes_on_where_it_was_stopped(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a limit some runs are made, called again the rest and none twice; unknown names are told."""
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
    """A second call would make the same runs again, and says so."""
    with FileLock(tmp_path / "headroom.lock"):
        result = CliRunner().invoke(command.app, ["run", "--grid", "headroom", "--rows", str(tmp_path)])
    assert result.exit_code == 2
    assert "'headroom' is being run already" in result.output


class Threads(concurrent.futures.ThreadPoolExecutor):
    """In place of processes, which would not see what a test has put in."""

    shutting: threading.Event

    def __init__(self, jobs: int, **_: object) -> None:
        super().__init__(jobs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.shutting.set()
        super().shutdown(wait, cancel_futures=cancel_futures)


def test_a_run_that_fails_ends_it_all_and_loses_none_that_was_under_way(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run ends after the failure is known, and has its row."""
    failing, other = (Run("toy", "lora", 1, 1e-3, seed) for seed in (0, 1))

    def execute(run: Run, _: Path) -> store.Row:
        if run == failing:
            raise OSError("no space left")
        assert Threads.shutting.wait(60)
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
    pool.submit(time.sleep, 600)
    time.sleep(600)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="processes are looked up in /proc")
def test_workers_end_with_the_command_that_is_killed(tmp_path: Path) -> None:
    """Their rows have nobody to write them, and the next call would make them again beside them."""
    script = tmp_path / "pool.py"
    script.write_text(_POOL, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        process.kill()
    deadline = time.monotonic() + 60
    while is_running(worker):
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Whether a process is there, and no zombie that nobody has waited for."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"


def row_of(run: Run, accuracy: float, loss: float | None = 1.0) -> store.Row:
    return {"key": run.key, **attrs.asdict(run), "validation": {"accuracy": accuracy, "loss": loss}}


def test_ranks_between_the_ends_take_the_rates_from_one_to_the_other() -> None:
    """Beyond the last rank the lower one and half of it."""
    for rank, expected in ((2, [1e-3, 2e-3, 4e-3]), (16, [5e-4, 1e-3])):
        found = grids.between(Run("movie-2", "lora", rank, 0.0, 0), [4e-3, 1e-3])
        assert [run.learning_rate for run in found] == pytest.approx(expected)
        assert {(run.rank, run.seed) for run in found} == {(rank, 0)}


def searched(asked: Run, peak: float, *, by_all_seeds: bool = False) -> list[store.Row]:
    """Every row that finds a method's learning rate, where its accuracy is highest at ``peak``."""
    found: list[store.Row] = []
    while rates.rate_of(asked, found, by_all_seeds=by_all_seeds) is None:
        wanted = rates.next_runs(asked, found, by_all_seeds=by_all_seeds)
        found += [row_of(run, 1 - abs(np.log(run.learning_rate / peak)) / 10) for run in wanted]
    return found


def test_a_rate_is_known_when_all_its_seeds_are_made() -> None:
    """And not while some are missing."""
    asked = Run("movie-2", "lora", 1, 0.0, 0)
    found = searched(asked, peak=4e-3)
    assert rates.rate_of(asked, found) == 4e-3
    assert rates.rate_of(asked, found[:-1]) is None
    assert rates.rate_of(asked, []) is None


def test_neighbours_of_the_first_seeds_best_are_decided_by_all_seeds() -> None:
    """Three rates by the mean of three seeds; a best at their edge asks for the next, until it lies between others."""
    asked = Run("movie-2", "lora", 8, 0.0, 0)
    found = [row for row in searched(asked, peak=1e-3) if row["seed"] == 0]
    accuracies = {2.5e-4: 0.7, 5e-4: 0.95, 1e-3: 0.8, 2e-3: 0.75}
    tried: list[tuple[float, ...]] = []
    while rates.rate_of(asked, found, by_all_seeds=True) is None:
        done = {(row["learning_rate"], row["seed"]) for row in found}
        wanted = rates.next_runs(asked, found, by_all_seeds=True)
        assert {run.seed for run in wanted} == {*rates.SEEDS}
        tried.append(tuple(sorted({run.learning_rate for run in wanted})))
        fresh = [run for run in wanted if (run.learning_rate, run.seed) not in done]
        found += [row_of(run, accuracies[run.learning_rate]) for run in fresh]
    assert tried == [(5e-4, 1e-3, 2e-3), (2.5e-4, 5e-4, 1e-3, 2e-3)]
    assert rates.rate_of(asked, found, by_all_seeds=True) == 5e-4
    assert rates.rate_of(asked, found) == 1e-3  # the first seed's alone


# The ablation


@pytest.mark.parametrize("change", ablation.CHANGES)
def test_every_change_is_a_setting_that_trains(change: str, toy: Path) -> None:
    """And ends at no more parameters than LoRA's and a λ for each triplet, if the budget is of parameters."""
    run = Run("toy", methods.ADALORA, ablation.RANK, 5e-3, 0, ablation.settings_of(change))
    lora = execute(attrs.evolve(run, method=methods.LORA, settings={}), toy)
    dearer = 12 * (48 - 32) if run.settings.get("budget_unit") == "rank" else 0
    assert execute(run, toy)["parameters"] <= lora["parameters"] + 12 + dearer  # type: ignore[operator]


@pytest.mark.parametrize("grid", ["ablation", "rates", "contest"])
def test_a_grid_whose_tasks_are_not_fixed_says_so(grid: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not end as if all had been run."""
    for name in ("ABLATED", "COMPARED"):
        monkeypatch.setattr(grids, name, ())
    result = CliRunner().invoke(command.app, ["run", "--grid", grid, "--rows", str(tmp_path)])
    assert result.exit_code == 2
    assert "not fixed yet" in result.output


def test_changes_differ() -> None:
    """No two are the same runs under two names."""
    found = [json.dumps(ablation.settings_of(change), sort_keys=True) for change in ablation.CHANGES]
    assert len({*found}) == len(found)


def test_an_ablation_stands_at_the_best_rate_of_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    """At its rank and not at another's; LoRA itself is among the runs; before the rate is known it is refused."""
    monkeypatch.setattr(grids, "ABLATED", ("movie-2",))
    asked = Run("movie-2", "lora", ablation.RANK, 0.0, 0)
    made = searched(asked, peak=2e-3, by_all_seeds=True)
    with pytest.raises(ValueError, match="run the grid rates first"):
        grids.ablation_runs({"rates": made[:-1]})
    elsewhere = searched(attrs.evolve(asked, rank=8), peak=1e-3, by_all_seeds=True)
    found = grids.ablation_runs({"rates": made + elsewhere, "headroom": searched(asked, peak=4e-3)})
    assert {run.learning_rate for run in found} == {2e-3}
    assert {run.method for run in found} == {"lora", "adalora"}
    assert len(found) == len({run.key for run in found}) == 2 + len(ablation.CHANGES) + len(ablation.AGAIN)
    assert Counter(run.seed for run in found)[1] == 1 + len(ablation.AGAIN)


def test_a_change_is_told_as_points_over_lora() -> None:
    """By seed; the best first, and a change that one task lacks not at all. Beside it what it makes of the loss."""
    both = ("movie-2", "nyt-3")
    lora = [row_of(Run(task, "lora", 1, 1e-3, seed), 0.5 + seed / 10) for task in both for seed in (0, 1)]
    better, worse, half = list(ablation.CHANGES)[:3]

    def made(change: str, tasks: tuple[str, ...], gain: float) -> list[store.Row]:
        settings = ablation.settings_of(change)
        return [
            row_of(Run(task, "adalora", 1, 1e-3, seed, settings), 0.5 + seed / 10 + gain, 1 - gain)
            for task in tasks
            for seed in (0, 1)
        ]

    changed = [*made(worse, both, -0.02), *made(better, both, 0.01), *made(half, both[:1], 1)]
    table = ablation.ablation_table([*lora, *changed])
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| {better}", f"| {worse}"]
    assert table[2].endswith("| +1.00 (2) | +1.00 (2) | +1.00 [+1.00, +1.00] | -1.0 [-1.0, -1.0] |")
    elsewhere = [{**row, "learning_rate": 2e-3} for row in lora] + [{**row, "rank": 8} for row in lora]
    assert ablation.ablation_table([*elsewhere, *changed]) == table[:2]


# The contest


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[store.Row]]:
    """Two tasks, one with headroom, and the rows that find LoRA's and AdaLoRA's learning rates on them."""
    monkeypatch.setattr(grids, "COMPARED", ("movie-2", "nyt-3"))
    monkeypatch.setattr(grids, "HEADROOM", ("movie-2",))
    peaks = {("lora", 1): 2e-3, ("lora", 8): 1e-3, ("adalora", 1): 4e-3, ("adalora", 8): 1e-3}
    made: dict[str, list[store.Row]] = {"headroom": [], "rates": []}
    for (method, rank), peak in peaks.items():
        for task in grids.COMPARED:
            made["rates"] += searched(Run(task, method, rank, 0.0, 0), peak, by_all_seeds=True)
    # Other rates than those of the contest: LoRA's curve is drawn from these, and nothing else is.
    made["headroom"] = [row for rank in (1, 2, 8) for row in searched(Run("movie-2", "lora", rank, 0.0, 0), 5e-4)]
    return made


def test_the_contest_takes_each_method_at_its_best_rate_and_at_the_others_too(
    compared: dict[str, list[store.Row]],
) -> None:
    """On test rows, where it is known; the lowest rank only where there is headroom; no seed that chose anything."""
    found = grids.contest_runs(compared)
    assert len({run.key for run in found}) == len(found)
    assert all(run.tested for run in found)
    counted = Counter((run.task, run.method, run.rank, run.learning_rate) for run in found)
    assert {run.seed for run in found if run.rank == 1}.isdisjoint(run.seed for run in found if run.rank == 8)
    eights = {(task, method, 8, 1e-3): 5 for task in ("movie-2", "nyt-3") for method in ("lora", "adalora")}
    ones = {("movie-2", method, 1, rate): 10 for method in ("lora", "adalora") for rate in (2e-3, 4e-3)}
    assert counted == {**eights, **ones}
    assert not {run.seed for run in found} & {*rates.SEEDS, *ablation.SEEDS}


def test_what_finds_the_rates_of_the_contest_is_asked_for(compared: dict[str, list[store.Row]]) -> None:
    """Of every method, LoRA too, whatever its headroom showed; PEFT's AdaLoRA is not for pictures."""
    found = {(run.task, run.method, run.rank) for run in grids.rates({"headroom": compared["headroom"]})}
    assert {(method, rank) for task, method, rank in found if task == "nyt-3"} == {("lora", 8), ("adalora", 8)}
    assert {(method, rank) for task, method, rank in found if task == "movie-2"} == {
        ("lora", 8),
        ("adalora", 8),
        ("head", 0),
        ("full", 0),
        ("lora", 1),
        ("adalora", 1),
        ("peft-adalora", 1),
    }
    on_pictures = {entry.method for entry in contest.entries("fashion-10", has_headroom=True)}
    assert on_pictures == {"lora", "adalora", "head", "full"}


def test_the_contest_is_told_by_task_and_over_all(compared: dict[str, list[store.Row]]) -> None:
    """Differences by seed at each method's best rate, at LoRA's, and PEFT's; what is not made stays empty."""
    gains = {("adalora", 4e-3): 0.02, ("adalora", 2e-3): 0.01, ("lora", 2e-3): 0.0, ("peft-adalora", 2e-3): -0.1}
    made = [
        {
            **row_of(Run("movie-2", method, 1, rate, seed, tested=True), 0.5),
            "test": {"accuracy": 0.6 + seed / 99 + gain, "loss": 2 - 10 * gain},
            "training_loss": 1 + gain,
        }
        for (method, rate), gain in gains.items()
        for seed in (10, 11)
    ]
    table = tables.compared_table({**compared, "contest": made}, rank=1)
    cells = [cell.strip() for cell in table[2].strip("|").split("|")]
    assert cells[0] == "movie-2"
    assert "(0.002, 2)" in cells[1]
    assert "(0.004, 2)" in cells[2]
    differences = ["+2.00 [+2.00, +2.00]", "+1.00 [+1.00, +1.00]", "", "-10.00 [-10.00, -10.00]"]
    assert cells[3:] == differences
    assert [cell.strip() for cell in table[3].strip("|").split("|")][3:] == differences
    assert len(tables.compared_table({**compared, "contest": made}, rank=8)) == 3
    validated = tables.compared_table(compared, rank=1, part="validation")
    assert validated[2].endswith("| +0.00 [+0.00, +0.00] | -6.93 [-6.93, -6.93] | +6.93 [+6.93, +6.93] |  |")
    elsewhere = [
        row
        for method, peak in (("lora", 2e-3), ("adalora", 4e-3))
        for row in searched(Run("nyt-3", method, 1, 0.0, 0), peak, by_all_seeds=True)
    ]
    more = {**compared, "rates": [*compared["rates"], *elsewhere]}
    fewer = [{**row, "task": "nyt-3"} for row in made if (row["method"], row["learning_rate"]) != ("adalora", 2e-3)]
    means = tables.compared_table({**more, "contest": [*made, *fewer]}, rank=1)[-1]
    assert "| +2.00 [+2.00, +2.00] | +1.00 [+1.00, +1.00] (1 of 2 tasks) |" in means
    beside = tables.beside_table({**compared, "contest": made}, rank=1)
    assert beside[2:] == ["| movie-2 | +2.00 | +0.00 | -10.0 | +0.0 | +2.0 |"]
    assert len(tables.beside_table({**compared, "contest": made}, rank=8)) == 2
    apart = [row for row in made if (row["method"] == "lora") == (row["seed"] == 10)]
    assert tables.compared_table({**compared, "contest": apart}, rank=1)[2].endswith("|  |  |  |  |")
    others = tables.reference_table({**compared, "contest": made})
    assert [cell.strip() for cell in others[2].strip("|").split("|")] == ["movie-2", "", "", ""]


def test_the_language_model_is_told_by_rate_and_method() -> None:
    """The contenders at both rates, LoRA first; the loss of a run that diverged is none, and so is their mean."""
    made: list[store.Row] = []
    for run in grids.generation({}):
        gain = 0.02 if run.method == "adalora" else 0.0
        loss = None if run.learning_rate == 4e-3 and run.method == "peft-adalora" else 2.0 + run.seed - contest.SEEDS[1]
        made.append(
            {**row_of(run, 0.5), "test": {"accuracy": 0.4 + gain + (run.seed - contest.SEEDS[1]) / 1000, "loss": loss}}
        )
    assert len(made) == 18
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables.generation_table(made)[2:]]
    assert [line[:2] for line in table] == [
        [rate, name] for rate in ("0.001", "0.004") for name in ("LoRA", "AdaLoRA", "PEFT's AdaLoRA")
    ]
    assert table[0][2:] == ["40.00 ± 0.06 (3)", "2.0000", ""]
    assert table[1][2:] == ["42.00 ± 0.06 (3)", "2.0000", "+2.00 [+2.00, +2.00]"]
    assert table[5][3:] == ["", "+0.00 [+0.00, +0.00]"]
    assert len(tables.generation_table(made[:1])) == 3
    begun = [made[0], next(row for row in made if row["method"] == "adalora" and row["seed"] != made[0]["seed"])]
    assert [line.split("|")[-2].strip() for line in tables.generation_table(begun)[2:]] == ["", ""]


@pytest.mark.parametrize(("peak", "tried"), [(2e-3, 3), (4e-3, 4), (1.6e-2, 6), (2.5e-4, 6)])
def test_rates_are_tried_until_the_best_lies_between_others(peak: float, tried: int) -> None:
    """Doubled or halved beyond the first three; then further seeds run at the best alone."""
    asked = Run("movie-2", "lora", 1, 0.0, 0)
    found: list[store.Row] = []
    while (runs := rates.next_runs(asked, found))[0].seed == 0:
        found += [row_of(run, 1 - abs(np.log(run.learning_rate / peak)) / 10) for run in runs]
    assert len(found) == tried
    assert [run.learning_rate for run in runs] == pytest.approx([peak, peak])
    assert [run.seed for run in runs] == [1, 2]


# Tables


def rows(task: str, rank: int, rate: float, accuracies: list[float]) -> list[store.Row]:
    return [
        {"task": task, "rank": rank, "learning_rate": rate, "seed": seed, "validation": {"accuracy": accuracy}}
        for seed, accuracy in enumerate(accuracies)
    ]


def test_the_best_rate_is_chosen_by_mean_validation_accuracy() -> None:
    """Among the rates with the most seeds: one lucky run is none."""
    cell = scores.best(rows("a", 1, 1e-3, [0.5, 0.6]) + rows("a", 1, 2e-3, [0.7, 0.6]) + rows("a", 1, 4e-3, [0.9]))
    assert (cell.rate, cell.seeds) == (2e-3, (0, 1))
    assert cell.mean == pytest.approx(65)
    assert cell.error == pytest.approx(np.std([70, 60], ddof=1) / 2**0.5)


def test_an_interval_draws_tasks_and_seeds() -> None:
    """Its mean weighs tasks alike; tasks that differ widen it, and one number has no width."""
    steady, other = np.array([1.0, 1.0, 1.0, 1.0]), np.array([3.0, 3.0])
    assert scores.interval([steady]) == (1, 1, 1)
    assert scores.interval([steady, other]) == (2, 1, 3)
    mean, low, high = scores.interval([np.array([0.0, 2.0, 0.0, 2.0])])
    assert mean == 1
    assert 0 <= low < 0.5
    assert 1.5 < high <= 2


def test_tables_of_nothing_are_their_heads(tmp_path: Path) -> None:
    """Before the first run there is nothing to tell, and it is told."""
    result = CliRunner().invoke(command.app, ["tables", "--rows", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "| task | r = 1 |" in result.output


def test_each_seed_of_the_ablation_has_its_own_table(tmp_path: Path) -> None:
    """LoRA's luck with a seed is every change's, so a change of both seeds is not ranked beside one of the first."""
    gains = {(0, "nothing"): 0.01, (1, "nothing"): 0.02, (0, "t_final 0.5"): 0.03}
    lora = [Run("nyt-3", "lora", 1, 1e-3, seed) for seed in ablation.SEEDS]
    made = [row_of(run, 0.5) for run in lora]
    for (seed, change), gain in gains.items():
        run = attrs.evolve(lora[seed], method="adalora", settings=ablation.settings_of(change))
        made.append(row_of(run, 0.5 + gain))
    for row in made:
        store.append(tmp_path / "ablation.jsonl", row)
    shown = CliRunner().invoke(command.app, ["tables", "--rows", str(tmp_path)]).output
    first, second = shown.split("ablation, seed 1")
    assert "| t_final 0.5 | +3.00 (1) | +3.00 |" in first
    assert "| nothing | +1.00 (1) | +1.00 |" in first
    assert "| nothing | +2.00 (1) | +2.00 |" in second
    assert "t_final 0.5" not in second


def test_headroom_is_a_point_between_rank_one_and_eight() -> None:
    """Differences are by seed, so a shift that all seeds share has no spread."""
    steep = rows("steep", 1, 1e-3, [0.5, 0.7]) + rows("steep", 8, 1e-3, [0.52, 0.72])
    flat = rows("flat", 1, 1e-3, [0.5, 0.7]) + rows("flat", 8, 1e-3, [0.505, 0.705])
    once = rows("once", 1, 1e-3, [0.5]) + rows("once", 8, 1e-3, [0.6])
    table = tables.headroom_table([*steep, *flat, *rows("begun", 1, 1e-3, [0.5, 0.6]), *once])
    assert [line.split(" | ")[0] for line in table[2:]] == ["| steep", "| flat", "| begun", "| once"]
    assert "+2.00 [+2.00, +2.00] | yes" in table[2]
    assert "+0.50 [+0.50, +0.50] | no" in table[3]
    assert "yes" not in table[4]
    assert table[5].endswith("| 60.00 (0.001, 1) |  | +10.00 | open |")


# Pictures


def test_curves_are_drawn_from_the_best_rates(compared: dict[str, list[store.Row]]) -> None:
    """LoRA's and AdaLoRA's ranks that have rows, each at its best rate, and the first seed over all rates."""
    (axes,) = plots.draw_sizes(("movie-2",), compared).axes[:1]
    curves: dict[str, Any] = {
        str(each.get_label()): each.lines[0].get_xydata()
        for each in axes.containers
        if isinstance(each, ErrorbarContainer)
    }
    drawn = {
        "LoRA, the headroom's runs": ("lora", "headroom", (1, 2, 8)),
        "LoRA": ("lora", "rates", (1, 8)),
        "AdaLoRA": ("adalora", "rates", (1, 8)),
    }
    assert curves.keys() == drawn.keys()
    for label, (method, grid, ranks) in drawn.items():
        made = {rank: grids.made_for(Run("movie-2", method, rank, 0.0, 0), compared, grid) for rank in ranks}
        assert curves[label].tolist() == [[rank, scores.best(found).mean] for rank, found in made.items()]
    lora_s = [row for row in compared["rates"] if (row["task"], row["method"], row["rank"]) == ("movie-2", "lora", 1)]
    (axes,) = plots.draw_rates(("movie-2",), compared, rank=1).axes[:1]
    lora = next(line for line in axes.lines if line.get_label() == "LoRA")
    tried, accuracies = (np.asarray(values) for values in lora.get_data())
    assert tried.tolist() == sorted({row["learning_rate"] for row in lora_s})
    assert tried[np.argmax(accuracies)] == pytest.approx(2e-3)


def test_a_diverged_run_does_not_set_the_frame() -> None:
    """What lies within six points of the best can be told apart; ticks are the rates that were tried."""
    both = [*rows("movie-2", 8, 1e-3, [0.8]), *rows("movie-2", 8, 2e-3, [0.3])]
    made = [{**row, "method": "lora"} for row in both]
    (axes,) = plots.draw_rates(("movie-2",), {"rates": made}, rank=8).axes[:1]
    assert axes.get_ylim() == (74.0, 80.5)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.001", "0.002"]


def test_learning_rates_show_each_seed_and_only_methods_that_ran() -> None:
    """A dot for each seed, a line through the means; the legend is of all panels, not of the first alone."""
    lora = [{**row, "method": "lora"} for row in rows("movie-2", 1, 1e-3, [0.8, 0.82])]
    peft = [{**row, "method": "peft-adalora"} for row in rows("nyt-3", 1, 2e-3, [0.7])]
    figure = plots.draw_rates(("movie-2", "nyt-3"), {"rates": [*lora, *peft]}, rank=1)
    first = figure.axes[0]
    assert np.asarray(first.lines[0].get_xydata()).tolist() == [[1e-3, pytest.approx(81.0)]]
    (dots,) = first.collections
    assert np.asarray(dots.get_offsets())[:, 1].tolist() == pytest.approx([80.0, 82.0])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["LoRA", "PEFT's AdaLoRA"]


def test_pictures_are_written_of_what_there_is(tmp_path: Path) -> None:
    """Of no rows, empty panels; the ranks of the first run of AdaLoRA on a task."""
    ranks = {f"layer.{layer}.{name}": layer for layer in range(3) for name in ("query", "value")}
    for seed in (10, 11):
        row = {**row_of(Run("amazon-3/qv", "adalora", 1, 1e-3, seed, tested=True), 0.5), "ranks": ranks}
        store.append(tmp_path / "contest.jsonl", row)
    out = tmp_path / "out"
    result = CliRunner().invoke(command.app, ["plots", "--rows", str(tmp_path), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert {file.name for file in out.iterdir()} == {
        "sizes.png",
        "rates-1.png",
        "rates-8.png",
        "ranks-amazon-3-qv-1.png",
    }
    assert plots.draw_map(store.read_all(tmp_path)["contest"][0]).axes[0].get_title() == "amazon-3/qv, rank 1, seed 10"
