"""The demo of a task: a small real model and real rows, without the hub."""

from collections.abc import Callable, Mapping
from pathlib import Path

import attrs

from tunerkit import TunerkitError
from tunerkit_cli import assets
from tunerkit_cli.rows import Table

_QUESTION = "Is this sentence from a film review positive or negative? Answer with one word. {}"


@attrs.frozen
class Demo:
    """What a task is shown with: functions of the cache folder and of how to print a line, and what counts as good."""

    model: Callable[[Path, Callable[[str], None]], Path]
    rows: Callable[[Path, Callable[[str], None]], Table]
    train_rows: int
    held_out_rows: int
    training: Mapping[str, object] = attrs.field(factory=dict)  # below those of the recipe
    good: str = ""


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
        good="accuracy 0.83 to 0.86; the head alone reaches 0.71",
    ),
    "causal-lm": Demo(assets.demo_language_model, conversations, 128, 16),
}
