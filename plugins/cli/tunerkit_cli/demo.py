"""The demo of a task: a small real model and real rows, without the hub."""

from collections.abc import Callable, Mapping
from pathlib import Path

import attrs

from tunerkit import TunerkitError
from tunerkit_cli import assets
from tunerkit_cli.rows import Table

_QUESTION = "Is this sentence from a film review positive or negative? Answer with one word. {}"


@attrs.frozen
class Good:
    """What a demo reaches when all goes well: ``metric`` from ``low`` to ``high``, and what the head alone reaches."""

    metric: str
    low: float
    high: float
    head_alone: float

    def __str__(self) -> str:
        return f"{self.metric} {self.low:.2f} to {self.high:.2f}; the head alone reaches {self.head_alone:.2f}"


@attrs.frozen
class Demo:
    """What a task is shown with.

    Attributes:
        model: Return the model's folder, given the cache folder and how to print a line.
        rows: Return the rows, given the same.
        train_rows: How many of them are trained on.
        held_out_rows: How many of the others are held out.
        training: The trainer's arguments, below those of the recipe.
        good: What is a good result; None if nobody has measured it.
    """

    model: Callable[[Path, Callable[[str], None]], Path]
    rows: Callable[[Path, Callable[[str], None]], Table]
    train_rows: int
    held_out_rows: int
    training: Mapping[str, object] = attrs.field(factory=dict)
    good: Good | None = None


def demo_of(task: str, missing: str) -> Demo:
    """Return a task's demo. Raises `TunerkitError`, which names the ``missing`` key, if it has none."""
    if task not in _DEMOS:
        raise TunerkitError(f"the task {task} needs --{missing}; only {' and '.join(_DEMOS)} have a demo without it")
    return _DEMOS[task]


def conversations(cache: Path, say: Callable[[str], None]) -> Table:
    """The movie sentences as questions and answers: one turn each."""
    rows = tuple(
        {
            "prompt": [{"role": "user", "content": _QUESTION.format(row["text"])}],
            "completion": [{"role": "assistant", "content": str(row["label"])}],
        }
        for row in assets.demo_sentences(cache, say).rows
    )
    return Table("questions on movie sentences", ("prompt", "completion"), rows)


_DEMOS = {
    "text-classification": Demo(
        model=assets.demo_model,
        rows=assets.demo_sentences,
        train_rows=4000,
        held_out_rows=3000,
        training={"eval_strategy": "no"},  # once at the end: 3,000 rows cost as much as 40 steps
        # AdaLoRA at the default rate, one thread: 0.8497, 0.8490, 0.8497 in fp32 (seeds 0 to 2), 0.8453 in bf16 (seed
        # 0). On fewer of the same sentences, movie-2 in docs/evidence/quality-record.md has 0.839 (LoRA) and 0.841
        # (AdaLoRA).
        good=Good("accuracy", 0.83, 0.86, head_alone=0.70),
    ),
    "causal-lm": Demo(assets.demo_language_model, conversations, 128, 16),
}
