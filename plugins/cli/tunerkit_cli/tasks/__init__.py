"""The tasks of ``tunerkit train``. Importing this package imports no torch."""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tunerkit import TunerkitError
from tunerkit.errors import closest

if TYPE_CHECKING:
    from tunerkit_cli.tasks.base import Task


class TaskError(TunerkitError):
    """There is no such task, or it cannot be told which one is meant."""


# Name of the task -> the module that has it, and the name of its class there.
TASKS: Mapping[str, tuple[str, str]] = {
    "text-classification": ("texts", "TextClassification"),
    "regression": ("texts", "Regression"),
    "multi-label": ("texts", "MultiLabel"),
    "token-classification": ("tokens", "TokenClassification"),
    "causal-lm": ("language", "CausalLm"),
    "preference": ("preferences", "Preference"),
    "orpo": ("preferences", "Orpo"),
    "kto": ("preferences", "Kto"),
    "reward": ("preferences", "Reward"),
    "grpo": ("rewards", "Grpo"),
    "seq2seq": ("language", "Seq2Seq"),
    "image-classification": ("images", "ImageClassification"),
    "embedding": ("embedding", "Embedding"),
}
LANGUAGE = ("causal-lm", "preference", "orpo", "kto", "grpo", "seq2seq")  # that train a language model
EQUAL = "equal_rewards"  # a metric of grpo: the share of prompts whose answers all have the same reward
GENERATED = ("causal-lm", "seq2seq")  # whose answers metrics by name compare


def task_of(name: str, max_length: int | None = None) -> "Task":
    """Return a task by name, which truncates to ``max_length`` tokens. Raises `TaskError` with the closest name."""
    if name not in TASKS:
        raise TaskError(f"there is no task {name!r}{closest(name, TASKS)}; the tasks are {', '.join(TASKS)}")
    module, kind = TASKS[name]
    task: Task = getattr(importlib.import_module(f"tunerkit_cli.tasks.{module}"), kind)(name, max_length)
    return task
