"""What a run works on, and what it came to."""

from collections.abc import Mapping
from pathlib import Path

import attrs
import torch
from rich.console import Console

from tunerkit.cli.batches import Encoded
from tunerkit.cli.models import Classifier
from tunerkit.cli.progress import watched
from tunerkit.cli.training import Recipe, Score, evaluate, train
from tunerkit.injection import Summary, Tuner
from tunerkit.records import RankChange

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
) -> tuple[float, ...]:
    """Train to the end behind a progress bar; the losses by step. ``dropout`` is `train`'s."""
    steps = train(task.classifier.model, task.train, recipe, device=task.device, dropout=dropout)
    total = recipe.total_steps(len(task.train.ids))
    return tuple(step.loss for step in watched(steps, total, console=console, title=title, tuner=tuner))


def score(task: Task) -> Score:
    """Accuracy and loss on the held-out rows."""
    return evaluate(task.classifier.model, task.held_out, batch_size=EVALUATION_BATCH, device=task.device)


def say(console: Console, text: str) -> None:
    """Print a line as it is: in a log it is not broken at 80 columns, and no name in it is taken for markup."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)
