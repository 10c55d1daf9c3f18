"""One run: a method on a task, at a rank, a learning rate and a seed; and its result."""

import hashlib
import json
import math
import time
from collections.abc import Mapping
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import attrs
import torch

from benchmarks.quality import methods
from benchmarks.quality.evaluation import Score, evaluate, majority
from benchmarks.quality.tasks import BATCH_SIZE, TASKS
from benchmarks.quality.training import Recipe, train

LIBRARIES: Final = ("tunerkit", "torch", "transformers", "peft")  # whose versions a row records


@attrs.frozen
class Run:
    """The run's inputs.

    ``settings`` override the method's defaults, and ``training`` those of the recipe. With ``tested``, test rows are
    scored too.
    """

    task: str
    method: str
    rank: int
    learning_rate: float
    seed: int
    settings: Mapping[str, Any] = attrs.field(factory=dict)
    tested: bool = False
    training: Mapping[str, Any] = attrs.field(factory=dict)

    @property
    def key(self) -> str:
        """A name that identifies the same run on every machine."""
        task = TASKS[self.task]
        fixed = [
            task.train,
            task.validation,
            task.test,
            task.epochs,
            BATCH_SIZE,
            task.targets,
            methods.SCALE,
            methods.HEAD_RATE,
        ]
        inputs = attrs.asdict(self)
        if not self.training:  # rows from before there was such a field keep their key
            del inputs["training"]
        text = json.dumps([inputs, fixed], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def recipe(self) -> Recipe:
        """The training recipe."""
        epochs = TASKS[self.task].epochs
        own = {"learning_rate": self.learning_rate, "seed": self.seed, **self.training}
        return Recipe(epochs=epochs, batch_size=BATCH_SIZE, **own)


def execute(run: Run, cache: Path) -> dict[str, object]:
    """Train in the run's precision and score in fp32, on every machine, and return a row for the file.

    The training loss of PEFT's AdaLoRA includes its regulariser.
    """
    torch.set_num_threads(1)
    began = time.perf_counter()
    task = TASKS[run.task]
    model, parts = task.build(cache, run.seed)
    prepared = methods.prepare(run, model, run.recipe.total_steps(len(parts.train.lengths)))
    optimizer = methods.adamw_with_heads(task, prepared.model, run.recipe)
    dropout = run.method != methods.HEAD_ONLY
    with prepared.running:
        steps = train(prepared.model, parts.train, run.recipe, optimizer, connect=prepared.connect, dropout=dropout)
        losses = list(steps)
    trained = time.perf_counter()
    scores = {"validation": evaluate(prepared.scored, parts.validation)}
    if run.tested:
        scores["test"] = evaluate(prepared.scored, parts.test)
    return {
        "key": run.key,
        **attrs.asdict(run),
        "steps": len(losses),
        "parameters": prepared.count(),
        **prepared.settings_and_ranks(),
        "training_loss": _tail(losses),
        "majority": majority(parts.validation),
        **{name: _plain(score) for name, score in scores.items()},
        "seconds": {"train": round(trained - began, 1), "all": round(time.perf_counter() - began, 1)},
        "made": {"date": str(date.today()), **{name: metadata.version(name) for name in LIBRARIES}},
    }


def _tail(losses: list[float]) -> float | None:
    """The mean loss of the last tenth of the steps; None if it is not finite, because JSON has no such number."""
    last = losses[-max(1, len(losses) // 10) :]
    mean = sum(last) / len(last)
    return mean if math.isfinite(mean) else None


def _plain(score: Score) -> dict[str, float | None]:
    return {"accuracy": score.accuracy, "loss": score.loss if math.isfinite(score.loss) else None}
