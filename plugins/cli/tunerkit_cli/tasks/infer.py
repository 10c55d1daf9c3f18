"""Which task a table is for, if the user does not say."""

import json
from collections.abc import Iterable

from tunerkit.errors import shown
from tunerkit.paths import few
from tunerkit_cli.rows import Table
from tunerkit_cli.tasks import TASKS, TaskError, task_of
from tunerkit_cli.tasks.base import LABEL, TEXT, name_in

# The first task whose columns are all there. Each set is enough to tell it from the others. The columns' other names
# count only where nothing else fits: many tables have a column "text", "label" or "path".
_BY_COLUMNS = (
    ("preference", {"chosen", "rejected"}),
    ("causal-lm", {"messages"}),
    ("causal-lm", {"prompt", "completion"}),
    ("token-classification", {"tokens", "tags"}),
    ("seq2seq", {"source", "target"}),
    ("image-classification", {"image", "label"}),
)


def infer(table: Table, names: dict[str, str]) -> str:
    """Return the task that the columns and labels of a table ask for.

    Args:
        table: The training data.
        names: The table's names of columns, by ours.

    Raises:
        TaskError: More than one task fits, or none does; the message says what was seen.
    """
    for task, needed in _BY_COLUMNS:
        if all(names.get(each, each) in table.columns for each in needed):
            return task
    label, has_text = name_in(table, LABEL, names), name_in(table, TEXT, names) in table.columns
    labels = [row.get(label) for row in table.rows] if label in table.columns else None
    if labels is not None and has_text:
        return _by_labels(labels, table.source, label)
    for task, needed in _BY_COLUMNS:
        ours = [each for each in task_of(task).columns if each.name in needed]
        if all(name_in(table, each, names) in table.columns for each in ours):
            return task
    if names.get("text", "text") in table.columns:
        return "causal-lm"
    if labels is not None:  # the missing column of texts is named next
        return _by_labels(labels, table.source, label)
    raise TaskError(
        f"{table.source}: its columns are {few([shown(each) for each in table.columns], shown=10)}, which fit no "
        f"task; say which one it is with --task ({', '.join(TASKS)}) and name its columns in the recipe"
    )


def _by_labels(values: Iterable[object], source: str, name: str) -> str:
    values = [value for value in values if value is not None]
    if any(isinstance(value, list) or _is_json_list(value) for value in values):
        return "multi-label"
    broken = next((value for value in values if _is_fraction(value)), None)
    if broken is not None:
        raise TaskError(
            f"{source}: column {name!r} has numbers such as {shown(broken)}. Is this regression? Pass --task "
            "regression, or --task text-classification if they are names of classes"
        )
    return "text-classification"


def _is_json_list(value: object) -> bool:
    if not isinstance(value, str) or not value.startswith("["):
        return False
    try:
        return isinstance(json.loads(value), list)
    except (ValueError, RecursionError):
        return False


def _is_fraction(value: object) -> bool:
    """Whether a label is a number with a point, such as 3.5, which no one names a class."""
    if isinstance(value, float):
        return True
    if not isinstance(value, str) or "." not in value:
        return False
    try:
        float(value)
    except ValueError:
        return False
    return True
