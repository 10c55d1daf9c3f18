"""The input of a run, and its results."""

import math
from collections.abc import Mapping
from pathlib import Path

import attrs
import torch
from rich.console import Console

from tunerkit import RankChange, Summary, Tuner
from tunerkit.cli.batches import Encoded
from tunerkit.cli.models import Classifier
from tunerkit.cli.progress import watched
from tunerkit.cli.training import DivergedError, Recipe, Score, evaluate, train

EVALUATION_BATCH = 64


@attrs.frozen
class Job:
    """All options of ``tunerkit train``. If ``model`` or ``data`` is None, the demo's is used."""

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
    """The model and its encoded data, ready for any method of fine-tuning."""

    classifier: Classifier
    source: str
    data: str
    train: Encoded
    held_out: Encoded
    device: torch.device


@attrs.frozen(eq=False)
class Outcome:
    """The results of one training run. ``history`` starts with the state before the first step."""

    score: Score
    losses: tuple[float, ...]
    seconds: dict[str, float]
    parameters: Summary
    history: tuple[RankChange, ...]


def fit(
    task: Task,
    recipe: Recipe,
    console: Console,
    *,
    title: str,
    tuner: Tuner | None = None,
    dropout: bool = True,
    must_converge: bool = True,
) -> tuple[float, ...]:
    """Train to the end, show a progress bar, and return the loss of each step. See `train` for ``dropout``.

    Raises `DivergedError` at the first loss that is not finite, unless ``must_converge`` is False.
    """
    steps = train(task.classifier.model, task.train, recipe, device=task.device, dropout=dropout)
    total = recipe.total_steps(len(task.train.ids))
    losses: list[float] = []
    for step in watched(steps, total, console=console, title=title, tuner=tuner):
        if must_converge:
            refuse_nonfinite(step.loss, f"at step {step.number} of {total}", recipe)
        losses.append(step.loss)
    return tuple(losses)


def refuse_nonfinite(loss: float, when: str, recipe: Recipe) -> None:
    """Raise `DivergedError` if ``loss`` is NaN or infinite. ``when`` says which loss it is."""
    if not math.isfinite(loss):
        raise DivergedError(
            f"the loss is {loss} {when}, so training was stopped and nothing was written; use a lower --lr than "
            f"{recipe.learning_rate:g}, or check the texts and the model"
        )


def score(task: Task) -> Score:
    """Evaluate on the held-out rows."""
    return evaluate(task.classifier.model, task.held_out, batch_size=EVALUATION_BATCH, device=task.device)


def say(console: Console, text: str) -> None:
    """Print a line as it is, without wrapping it at 80 columns and without reading names as markup."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)
