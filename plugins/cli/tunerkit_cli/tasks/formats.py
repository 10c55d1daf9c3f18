"""Which task rows are for, and the forms of rows for language models elsewhere, which become ours. No torch here.

Names are those of TRL, LLaMA-Factory and axolotl.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Final

import attrs

from tunerkit.errors import shown
from tunerkit.paths import few
from tunerkit_cli.rows import BadValue, Table, from_json
from tunerkit_cli.tasks import LANGUAGE, TASKS, TaskError, task_of
from tunerkit_cli.tasks.base import LABEL, TEXT, name_in

_Row = Mapping[str, Any]
_LANGUAGE: Final = (None, *LANGUAGE, "reward")  # None: the task is still to be found


@attrs.frozen
class Form:
    """Columns of a known form, in whose place come ours, each with what makes its value of a row, or a `BadValue`."""

    columns: tuple[str, ...]
    made: Mapping[str, Callable[[_Row], object]]
    fits: Callable[[_Row], bool] = lambda row: True


def _joined(first: str, second: str) -> Form:
    """An instruction, and its input in a second column."""

    def prompt(row: _Row) -> object:
        texts = [each for each in (row[first], row[second]) if each is not None]
        if row[first] is None or not all(isinstance(each, str) for each in texts):
            return BadValue("prompt", "expected texts, got %s", [row[first], row[second]])
        return "\n".join(text for text in texts if text.strip())

    return Form((first, second), {"prompt": prompt})


def _headed(name: str, head: str) -> Form:
    """Conversations whose system prompt, or whose tools, are in a column of their own: they go into the messages."""

    def messages(row: _Row) -> object:
        found, value = row[name], row[head]
        first = found[0] if isinstance(found, list) and found and isinstance(found[0], dict) else None
        if first is None or not value or (isinstance(value, str) and not value.strip()):
            return found
        if head == "system":
            has_own = first.get("role", first.get("from")) == "system"
            return found if has_own else [{"role": "system", "content": value}, *found]
        tools = from_json(value)
        if not isinstance(tools, list) or not all(isinstance(each, dict) for each in tools):
            return BadValue(name, "expected tools as a list of JSON schemas, got %s", value)
        return [{**first, "tools": tools}, *found[1:]]

    return Form((name, head), {name: messages}, lambda row: isinstance(row[name], list))


def _shared(row: _Row) -> int:
    """How many messages ``chosen`` and ``rejected`` have in common at their start; 0 if one has no others."""
    chosen, rejected = row["chosen"], row["rejected"]
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        return 0
    pairs = zip(chosen, rejected, strict=False)
    return next((number for number, (one, other) in enumerate(pairs) if one != other), 0)


def _implicit_prompt(row: _Row) -> object:
    wrong = "chosen and rejected do not begin with the same messages, or do not differ; remove the row"
    return row["chosen"][: _shared(row)] if _shared(row) else BadValue("prompt", wrong)


def _rest(name: str) -> Callable[[_Row], object]:
    return lambda row: row[name][_shared(row) :] if isinstance(row[name], list) else row[name]


def _has_implicit_prompt(row: _Row) -> bool:
    chosen = row["chosen"]
    first = chosen[0] if isinstance(chosen, list) and chosen and isinstance(chosen[0], dict) else {}
    asks = first.get("role", first.get("from")) not in (None, "assistant", "gpt")
    return asks and not isinstance(row.get("prompt"), list)


FORMS: Final = (
    *(_joined(*pair) for pair in (("instruction", "input"), ("instruction", "context"), ("question", "context"))),
    Form(
        ("chosen", "rejected"),
        {"prompt": _implicit_prompt, "chosen": _rest("chosen"), "rejected": _rest("rejected")},
        _has_implicit_prompt,
    ),
    *(_headed(name, head) for name in ("messages", "conversations", "prompt") for head in ("system", "tools")),
)


def standard(table: Table, names: Mapping[str, str], task: str | None = None) -> Table:
    """Return a table with our columns in place of those of the `FORMS`, which are for language models.

    What ``names``, a recipe's ``columns``, says of a column counts: such columns are left as they are. Two columns are
    not joined where the column that they would make is there.
    """
    for form in FORMS if task in _LANGUAGE else ():
        there = {each: names.get(each, each) for each in form.columns}
        named = ({*form.made} - {*form.columns}) & {*names} or {*form.columns} & {*names.values()}
        ours = {
            each: "source" if (each, task) == ("prompt", "seq2seq") else names.get(each, each) for each in form.made
        }
        is_there = len(form.made) == 1 and {ours[each] for each in form.made if each not in there} & {*table.columns}
        if named or is_there or not {*there.values()} <= {*table.columns}:
            continue
        views = [{**row, **{ours: row.get(name) for ours, name in there.items()}} for row in table.rows]
        if not any(map(form.fits, views)):
            continue
        kept = [name for name in table.columns if name not in there.values()]
        rows = [
            {name: view.get(name) for name in kept} | {ours[each]: make(view) for each, make in form.made.items()}
            for view in views
        ]
        parts = " + ".join(table.made.get(name, name) for name in there.values())
        made = {ours[each]: parts for each in form.made if each not in form.columns or len(form.made) == 1}
        columns = tuple(dict.fromkeys((*ours.values(), *kept)))
        table = attrs.evolve(table, columns=columns, rows=tuple(rows), made={**table.made, **made})
    return table


# --- rows that no task trains ---

_ASKED: Final = ("prompt", "instruction", "question")
_ANSWERED: Final = ("completion", "response", "output", "answer")
_OTHER_TASKS: Final = ("messages", "text", "chosen", "label", "category", "target", "tags")
_TO_CHECK: Final = ("ground_truth", "solution", "final_answer", "reward_model")  # what a reward compares an answer with
_LABELS: Final = ("kto_tag", "label")
_JUDGED: Final = ({"true", "false"}, {"1", "0"}, {"1.0", "0.0"}, {"good", "bad"}, {"desirable", "undesirable"})
_BESIDE: Final = ("messages", "conversations", "text", *_ASKED)
_MEDIA: Final = {"image": "images", "images": "images", "audio": "sound", "audios": "sound", "videos": "videos"}


def refuse_other(table: Table, names: Mapping[str, str], task: str | None = None) -> str:
    """Raise `TaskError` for rows of a training that no task does, or may not; return what to tell of others."""
    if task not in _LANGUAGE:
        return ""
    there = {*table.columns} - {*names.values()} | {*names}
    asked = next((each for each in (*_ASKED, "problem", "query", "messages") if each in there), "")
    answered = bool({*_ASKED} & there and {*_ANSWERED} & there)
    label = (
        _judgement(table, there, answered=answered)
        if answered or {"messages", "conversations", "kto_tag"} & there
        else ""
    )
    to_check = next((each for each in _TO_CHECK if each in there and not {*_ANSWERED, "chosen"} & there), "")
    media = next((each for each in (*_MEDIA, *table.columns) if _has_media(table, each)), "")
    what = _MEDIA.get(media, "images or sound")
    is_open = task is None and not ("label" in there and {"text", "image"} & there)  # else for a classification
    beside = next((each for each in _BESIDE if each in there), None)
    said = ""
    if label and task is None:
        named = "" if label in _LABELS else f" --set columns.label={label}"
        said = (
            f"answers with a {shown(label)} of true or false are unpaired preferences: pass --task kto{named} to learn "
            "from good and bad ones. To learn the good ones alone, keep the rows with true and leave the column out; "
            "texts with such classes are for --task text-classification, and --task causal-lm learns all"
        )
    elif task is None and asked and to_check and not (asked == "messages" and any(map(_has_answer, table.rows))):
        named = "" if asked in _ASKED else f" --set columns.prompt={asked}"
        said = (
            f"{shown(asked)} has no answers to learn, and {shown(to_check)} to check some. To learn from rewards of "
            f"the model's own answers, pass --task grpo{named} with --set reward=FILE.py:FUNCTION and --allow-code; to "
            f"learn {shown(to_check)} itself, pass --task causal-lm{named} --set columns.completion={to_check}"
        )
    elif task is None and "prompt" in there and not {*_ANSWERED[:-1], *_OTHER_TASKS} & there:
        said = (
            "its prompts have no completions. To learn from rewards of the model's own answers, pass --task grpo with "
            "--set reward=FILE.py:FUNCTION and --allow-code; if there is a column of completions to learn, name it "
            "with --set columns.completion=NAME, or pass --task causal-lm if it is 'answer'"
        )
    elif media and (beside in _BESIDE[:2] or (is_open and (beside or not what.startswith("images")))):
        where = f" beside the text in {shown(beside)}" if beside else ""
        do = ", or say with --task what is trained without it" if task is None else ""
        said = f"has {what} in {shown(media)}{where}, which no task reads; leave the column out{do}"
    if said:
        raise TaskError(f"{table.source}: {said}")
    is_silent = not label or task in ("preference", "orpo", "kto", "reward", "grpo")
    return "" if is_silent else f"{table.source}: {shown(label)} is not read, so good and bad answers are learned alike"


def _judgement(table: Table, there: Collection[str], *, answered: bool) -> str:
    """The column that says whether an answer is a good one, by its name, or as truth values beside a prompt and it."""
    for name in filter(there.__contains__, dict.fromkeys((*_LABELS, *table.columns))):
        values = {str(row.get(name)).strip().lower() for row in table.rows} - {"none", ""}
        is_judged = values in _JUDGED or bool(values and values < _JUDGED[0]) if name in _LABELS else False
        if is_judged or (answered and values == _JUDGED[0]):
            return name
    return ""


def _has_answer(row: _Row) -> bool:
    """Whether the last message of a conversation is the assistant's."""
    last = row["messages"][-1] if isinstance(row.get("messages"), list) and row["messages"] else None
    return isinstance(last, dict) and last.get("role", last.get("from")) in ("assistant", "gpt")


def _has_media(table: Table, name: str) -> bool:
    """Whether a column has images or sound, by its name, or by its first value: ``datasets`` writes them as bytes."""
    values = (row.get(name) for row in table.rows)
    if name in _MEDIA:
        return any(isinstance(value, str | bytes | list | dict) and value for value in values)
    first = next(filter(None, values), None)
    each = first[0] if isinstance(first, list) else first
    return isinstance(each, bytes) or (isinstance(each, dict) and bool(each) and each.keys() <= {"bytes", "path"})


# --- the task of rows ---

_FRACTION = re.compile(r"\s*[-+]?(\d+\.\d*|\.\d+)(e[-+]?\d+)?\s*", re.IGNORECASE)
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
    # No one names a class by a number with a point, such as 3.5.
    broken = next((each for each in values if isinstance(each, float) or _FRACTION.fullmatch(str(each))), None)
    if broken is not None:
        raise TaskError(
            f"{source}: column {name!r} has numbers such as {shown(broken)}. Is this regression? Pass --task "
            "regression, or --task text-classification if they are names of classes"
        )
    return "text-classification"
