"""Which task a table is for, if the user does not say."""

import re
from collections.abc import Iterable, Mapping, Sequence

from tunerkit.errors import shown
from tunerkit.paths import few
from tunerkit_cli.rows import Table, from_json
from tunerkit_cli.tasks import TASKS, TaskError, task_of
from tunerkit_cli.tasks.base import LABEL, TEXT, name_in
from tunerkit_cli.tasks.formats import refuse_other, standard

_FRACTION = re.compile(r"[-+]?(\d+\.\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
# The columns that tell each task. Their other names count only where nothing else fits: many tables have a column
# "text", "label" or "path".
_BY_COLUMNS = (
    ("preference", {"chosen", "rejected"}),
    ("causal-lm", {"messages"}),
    ("causal-lm", {"prompt", "completion"}),
    ("token-classification", {"tokens", "tags"}),
    ("seq2seq", {"source", "target"}),
    ("embedding", {"anchor", "positive"}),
    ("image-classification", {"image", "label"}),
    ("text-classification", {"text", "label"}),  # or another task with labels
)


def infer(table: Table, names: dict[str, str]) -> str:
    """Return the task that the training data asks for. Raises `TaskError` if more than one task fits, or none does."""
    refuse_other(table, names)
    seen = f"{table.source}: its columns are {few([shown(each) for each in table.columns], shown=10)}, which fit"
    table = standard(table, names)
    fitting = [task for task, needed in _BY_COLUMNS if {names.get(each, each) for each in needed} <= {*table.columns}]
    if (task := _only(fitting, seen, names)) and task != "text-classification":
        return task
    label, has_text = name_in(table, LABEL, names), name_in(table, TEXT, names) in table.columns
    labels = [row.get(label) for row in table.rows] if label in table.columns else None
    if labels is not None and has_text:
        return _by_labels(labels, table.source, label)
    fitting = []
    for task, needed in _BY_COLUMNS[:-1]:
        ours = [each for each in task_of(task).columns if each.name in needed]
        if all(name_in(table, each, names) in table.columns for each in ours):
            fitting.append(task)
    if "prompt" in table.made and "causal-lm" in fitting and not names:
        return "causal-lm"  # as Alpaca has a column "text" too
    if task := _only(fitting, seen, names):
        return task
    if names.get("text", "text") in table.columns:
        return "causal-lm"
    if labels is not None:  # the missing column of texts is named next
        return _by_labels(labels, table.source, label)
    raise TaskError(
        f"{seen} no task; say which one it is with --task ({', '.join(TASKS)}) and name its columns in the recipe"
    )


def _only(fitting: Sequence[str], seen: str, names: Mapping[str, str]) -> str | None:
    """The one task that fits; of several, the one with all columns that the recipe names. Raises `TaskError`."""
    named = [task for task in fitting if {*names} <= {each.name for each in task_of(task).columns}]
    found = list(dict.fromkeys(named if names and named else fitting))
    if len(found) > 1:
        raise TaskError(f"{seen} {' and '.join(found)}; say which one it is with --task")
    return found[0] if found else None


def _by_labels(values: Iterable[object], source: str, name: str) -> str:
    values = [value for value in values if value is not None]
    if any(isinstance(from_json(value), list) for value in values):
        return "multi-label"
    broken = next((value for value in values if _is_fraction(value)), None)
    if broken is not None:
        raise TaskError(
            f"{source}: column {name!r} has numbers such as {shown(broken)}. Is this regression? Pass --task "
            "regression, or --task text-classification if they are names of classes"
        )
    return "text-classification"


def _is_fraction(value: object) -> bool:
    """Whether a label is a number with a point, such as 3.5, which no one names a class."""
    return isinstance(value, float) or (isinstance(value, str) and _FRACTION.fullmatch(value.strip()) is not None)
