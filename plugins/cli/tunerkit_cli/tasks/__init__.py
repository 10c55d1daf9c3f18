"""The tasks of ``tunerkit train``: one file each. Importing this package imports no torch."""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tunerkit import TunerkitError
from tunerkit.errors import closest

if TYPE_CHECKING:
    from tunerkit_cli.tasks.base import Task


class TaskError(TunerkitError):
    """There is no such task, or it cannot be told which one is meant."""


# Name of the task -> the class's name in the module that is called like the task.
TASKS: Mapping[str, str] = {
    "text-classification": "TextClassification",
    "regression": "Regression",
    "multi-label": "MultiLabel",
    "token-classification": "TokenClassification",
    "causal-lm": "CausalLm",
    "preference": "Preference",
    "seq2seq": "Seq2Seq",
    "image-classification": "ImageClassification",
}


def task_of(name: str, max_length: int | None = None) -> "Task":
    """Return a task by name, which truncates to ``max_length`` tokens. Raises `TaskError` with the closest name."""
    if name not in TASKS:
        raise TaskError(f"there is no task {name!r}{closest(name, TASKS)}; the tasks are {', '.join(TASKS)}")
    module = importlib.import_module(f"tunerkit_cli.tasks.{name.replace('-', '_')}")
    task: Task = getattr(module, TASKS[name])(max_length)
    return task
