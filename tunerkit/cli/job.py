"""The main job: load, wrap, train, score, save, and tell what came of it."""

import functools
import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import attrs
import torch
from rich.console import Console

import tunerkit
from tunerkit.cli import assets, outputs
from tunerkit.cli.batches import Encoded, encode
from tunerkit.cli.data import DataError, Examples, class_names, read_examples, split
from tunerkit.cli.models import Classifier, load_classifier
from tunerkit.cli.progress import watched
from tunerkit.cli.training import Recipe, Score, choose_device, evaluate, train
from tunerkit.records import RankChange
from tunerkit.report.rank_map import rank_map
from tunerkit.report.terminal import rank_table
from tunerkit.tuner import Tuner

DEMO_TRAIN_ROWS = 4000
DEMO_HELD_OUT_ROWS = 3000
HELD_OUT_SHARE = 0.2
# The demo's split is a constant: --seed changes the run, never what it is measured on.
SPLIT_SEED = 0
# Trained alone, a head wants larger steps than adapters do; on the demo the best of a wider grid lies among these.
HEAD_RATES = (1e-2, 3e-2, 1e-1)
EVALUATION_BATCH = 64


@attrs.frozen
class Job:
    """All that ``tunerkit train`` was told. No ``model`` or no ``data``: the demo's."""

    out: Path
    method: str = "adalora"
    settings: Mapping[str, object] = attrs.field(factory=dict)
    model: str | None = None
    data: Path | None = None
    eval_data: Path | None = None
    text_column: str = "text"
    label_column: str = "label"
    max_length: int = 128
    baseline: bool = True
    recipe: Recipe = attrs.field(factory=Recipe)


@attrs.frozen(eq=False)
class Task:
    """The model with its data, ready for any way of tuning."""

    classifier: Classifier
    source: str
    data: str
    train: Encoded
    held_out: Encoded
    device: torch.device


@attrs.frozen(eq=False)
class Outcome:
    """What one way of tuning came to. ``history`` begins before the first step."""

    score: Score
    losses: tuple[float, ...]
    seconds: dict[str, float]
    parameters: tunerkit.Summary
    history: tuple[RankChange, ...]


def run(job: Job, console: Console) -> None:
    """Do the job, print what came of it, and leave the files in ``job.out``."""
    tunerkit.structure(job.method, job.settings)  # a typing error is told before anything is made or downloaded
    outputs.prepare(job.out)
    task = prepare(job, console)
    model = task.classifier.model
    # A fresh head knows nothing: it is trained in full, unless the settings name other modules.
    trained = job.settings.get("train_modules") or list(task.classifier.heads)
    tunerkit.wrap(model, job.method, {**job.settings, "train_modules": trained}, seed=job.recipe.seed)
    tuner = tunerkit.tuner(model)
    outcome = tune(task, job, tuner, console)
    record = metrics(task, job, tuner, outcome)
    with outputs.publishing(job.out) as scratch:
        tunerkit.save(model, scratch)
        write_json(scratch / "metrics.json", record)
        write_pictures(scratch, job.method, tuner, outcome, console)
    console.print(rank_table(rank_map(tuner.ranks()), initial=max(outcome.history[0].ranks.values(), default=None)))
    say(console, f"budget {tuner.budget()}, live triplets in the masks {sum(tuner.ranks().values())}")
    say(console, f"{job.method}: accuracy {outcome.score.accuracy:.4f} on {len(task.held_out.ids)} held-out rows")
    if job.baseline:
        record["baseline"] = compare(task, job, tuner, outcome, console)
        with outputs.publishing(job.out) as scratch:
            write_json(scratch / "metrics.json", record)
    say(console, f"written to {job.out}: {', '.join(sorted(file.name for file in job.out.iterdir()))}")


def prepare(job: Job, console: Console) -> Task:
    """Read and split the data, load the model with a head for its classes, and encode the texts."""
    examples, held_out, data = read_data(job, console)
    classes = class_names(examples.labels)
    if len(classes) < 2:
        raise DataError(
            f"{data}: every training row is labelled {classes[0]!r}; a classifier needs two classes or more"
        )
    source = job.model or str(assets.demo_model(assets.cache_folder(), functools.partial(say, console)))
    classifier = load_classifier(source, classes, seed=job.recipe.seed)
    device = choose_device()
    classifier.model.to(device)
    encoded = [encode(classifier, part, max_length=job.max_length) for part in (examples, held_out)]
    return Task(classifier, job.model or "all-MiniLM-L6-v2", data, encoded[0], encoded[1], device)


def read_data(job: Job, console: Console) -> tuple[Examples, Examples, str]:
    """Training rows, held-out rows, and where they are from."""
    columns = {"text_column": job.text_column, "label_column": job.label_column}
    if job.data is None:
        if job.eval_data is not None:
            raise DataError("--eval-data needs --data: the demo has held-out sentences of its own")
        sentences = assets.demo_sentences(assets.cache_folder(), functools.partial(say, console))
        examples, rest = split(sentences, train_rows=DEMO_TRAIN_ROWS, seed=SPLIT_SEED)
        return examples, rest.take(range(DEMO_HELD_OUT_ROWS)), "movie sentences"
    examples = read_examples(job.data, **columns)
    if job.eval_data is not None:
        return examples, read_examples(job.eval_data, **columns), str(job.data)
    held_out = round(HELD_OUT_SHARE * len(examples))
    if held_out == 0:
        raise DataError(f"{job.data}: {len(examples)} rows are too few to hold some out; name others with --eval-data")
    return *split(examples, train_rows=len(examples) - held_out, seed=SPLIT_SEED), str(job.data)


def tune(task: Task, job: Job, tuner: Tuner, console: Console) -> Outcome:
    """Train the wrapped model and score it."""
    model = task.classifier.model
    parameters = tunerkit.trainable_parameters(model)
    say(console, f"{job.method} on {len(tuner.targets)} matrices of {task.source}: {parameters}")
    start = RankChange(step=0, budget=tuner.budget(), ranks=tuner.ranks())
    began = time.perf_counter()
    losses = fit(task, job.recipe, console, title=job.method, tuner=tuner)
    trained = time.perf_counter()
    score = evaluate(model, task.held_out, batch_size=EVALUATION_BATCH, device=task.device)
    seconds = {"train": trained - began, "evaluate": time.perf_counter() - trained}
    end = RankChange(step=tuner.steps, budget=tuner.budget(), ranks=tuner.ranks())
    return Outcome(score, losses, seconds, parameters, (start, *tuner.history, end))


def fit(task: Task, recipe: Recipe, console: Console, *, title: str, tuner: Tuner | None = None) -> tuple[float, ...]:
    """Train to the end behind a progress bar; the losses by step."""
    steps = train(task.classifier.model, task.train, recipe, device=task.device)
    total = recipe.total_steps(len(task.train.ids))
    return tuple(step.loss for step in watched(steps, total, console=console, title=title, tuner=tuner))


def compare(task: Task, job: Job, tuner: Tuner, outcome: Outcome, console: Console) -> dict[str, object]:
    """Train the same heads on the frozen base: same rows, order, epochs and dropout; the best of three rates.

    The best is chosen by the held-out accuracy itself, which favours this baseline.
    """
    model = tunerkit.unwrap(task.classifier.model)
    heads = [place.path for place in tuner.copies]
    if not heads:
        say(console, "no baseline: the settings train no module in full")
        return {}
    began = time.perf_counter()
    scores = {
        rate: head_only(task, attrs.evolve(job.recipe, learning_rate=rate), heads, console) for rate in HEAD_RATES
    }
    best = max(scores, key=lambda rate: scores[rate].accuracy)
    gain = 100 * (outcome.score.accuracy - scores[best].accuracy)
    say(
        console,
        f"head only: accuracy {scores[best].accuracy:.4f} (base frozen, {', '.join(heads)} trained in full on the same "
        f"rows and epochs; best of learning rates {', '.join(f'{rate:g}' for rate in HEAD_RATES)})",
    )
    say(console, f"{job.method} is {gain:+.1f} points from head-only tuning")
    return {
        "what": "base frozen, heads trained in full; best learning rate by held-out accuracy",
        "heads": heads,
        "accuracy": scores[best].accuracy,
        "learning_rate": best,
        "accuracy_by_learning_rate": {f"{rate:g}": score.accuracy for rate, score in scores.items()},
        "seconds": time.perf_counter() - began,
        "parameters": tunerkit.trainable_parameters(model).trainable,
    }


def head_only(task: Task, recipe: Recipe, heads: Sequence[str], console: Console) -> Score:
    """One run of the baseline; the heads are then as they were before."""
    model = task.classifier.model
    model.requires_grad_(False)
    start = {head: {k: v.clone() for k, v in model.get_submodule(head).state_dict().items()} for head in heads}
    for head in heads:
        model.get_submodule(head).requires_grad_(True)
    fit(task, recipe, console, title=f"head only, {recipe.learning_rate:g}")
    score = evaluate(model, task.held_out, batch_size=EVALUATION_BATCH, device=task.device)
    for head in heads:
        model.get_submodule(head).load_state_dict(start[head])
    return score


def metrics(task: Task, job: Job, tuner: Tuner, outcome: Outcome) -> dict[str, Any]:
    """All figures of the run, as JSON can hold them."""
    owner = tunerkit.methods()[job.method]
    return {
        "method": job.method,
        "model": task.source,
        "data": task.data,
        "classes": list(task.classifier.classes),
        "rows": {"train": len(task.train.ids), "held_out": len(task.held_out.ids)},
        "accuracy": outcome.score.accuracy,
        "loss": finite(outcome.score.loss),
        "train_losses": [finite(round(loss, 6)) for loss in outcome.losses],
        "seconds": outcome.seconds,
        "device": str(task.device),
        "parameters": {"trained": outcome.parameters.trainable, "all": outcome.parameters.total},
        "steps": tuner.steps,
        "budget": {"start": outcome.history[0].budget, "end": tuner.budget(), "live": sum(tuner.ranks().values())},
        "ranks": tuner.ranks(),
        "history": [
            {"step": change.step, "budget": change.budget, "ranks": list(change.ranks.values())}
            for change in outcome.history
        ],
        "config": tunerkit.unstructure(tuner.config),
        "recipe": {**attrs.asdict(job.recipe), "max_length": job.max_length},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "tunerkit")},
            owner.distribution: owner.version,
        },
    }


def say(console: Console, text: str) -> None:
    """Print a line as it is: in a log it is not broken at 80 columns, and no name in it is taken for markup."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def finite(number: float) -> float | None:
    """``number``, or None where training diverged: JSON knows neither NaN nor infinity."""
    return number if math.isfinite(number) else None


def write_json(path: Path, record: Mapping[str, object]) -> None:
    """Indented JSON, as the standard has it."""
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def write_pictures(folder: Path, method: str, tuner: Tuner, outcome: Outcome, console: Console) -> None:
    """``ranks.png`` and ``budget.png``, or a line that says what they need."""
    try:
        from tunerkit.report import plots  # the extra [plot] is not a part of [cli]
    except ModuleNotFoundError:
        say(console, 'no pictures without matplotlib: pip install "tunerkit[plot]"')
        return
    initial = max(outcome.history[0].ranks.values(), default=None)
    title = f"{method}: live ranks after {tuner.steps} steps"
    plots.draw_ranks(rank_map(tuner.ranks()), title=title, initial=initial).savefig(folder / "ranks.png", dpi=150)
    unit = str(tunerkit.unstructure(tuner.config).get("budget_unit", "rank"))
    figure = plots.draw_budget(outcome.history, title=f"{method}: budget and ranks", unit=unit)
    figure.savefig(folder / "budget.png", dpi=150)
