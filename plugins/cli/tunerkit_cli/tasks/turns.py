"""Conversations: as lists of messages, and as tokens, of which a model learns the assistant's turns alone.

A message has TRL's form: a role and a content, and perhaps tool calls. The first one also holds the ``tools``.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jinja2
import jinja2.nodes

from tunerkit.errors import FileError, shown
from tunerkit_cli.rows import BadValue, DataError, kind_of
from tunerkit_cli.tasks.base import NOT_LEARNED
from tunerkit_transformers.pretrained import Pretrained
from tunerkit_transformers.run_folder import irregular

_ROLES: Final = ("system", "user", "assistant", "tool")
_OUR_ROLE: Final = {name: name for name in _ROLES} | {
    **{"developer": "system", "human": "user", "gpt": "assistant", "function_call": "assistant"},
    **{"observation": "tool", "function_response": "tool"},
}
_KEPT: Final = ("name", "tool_call_id", "reasoning_content", "thinking", "tools")
_MARK: Final = re.compile(r"{%[-+]?\s*(end)?generation\s*[-+]?%}")  # a tag of transformers alone
# Stands for an answer, to see where a template puts it. No template cuts or changes a word.
_PLACE = "tunerkitanswer"

Messages = Sequence[Mapping[str, Any]]
Render = Callable[..., str]


def messages_of(value: object, column: str) -> list[dict[str, Any]]:
    """Return a conversation whose messages have a role and a content, from ShareGPT's form too. Raises `BadValue`."""
    if not isinstance(value, list) or not value:
        raise BadValue(column, "expected a list of messages, got %s", value)
    return [_message(each, column) for each in value]


def _message(value: object, column: str) -> dict[str, Any]:
    given = {key: each for key, each in value.items() if each is not None} if isinstance(value, dict) else {}
    role, content = given.get("role", given.get("from")), given.get("content", given.get("value"))
    calls = given.get("tool_calls")
    if role == "function_call":  # in ShareGPT's form, the content is the call
        calls, content = content, ""
    content = "" if content is None and calls else content
    if role is None or content is None:
        raise BadValue(column, "a message has a role and a content, got %s", value)
    if isinstance(content, list):
        parts = [each if isinstance(each, dict) else {} for each in content]
        if not all(each.get("type") == "text" and isinstance(each.get("text"), str) for each in parts):
            said = "has images or sound beside text, which no task reads, in %s; remove the row"
            raise BadValue(column, said, content)
        content = "".join(each["text"] for each in parts)
    if not isinstance(role, str) or role not in _OUR_ROLE or not isinstance(content, str):
        raise BadValue(column, f"expected a role of {', '.join(_ROLES)} and a text, got %s", value)
    found = {"role": _OUR_ROLE[role], "content": content, **{key: given[key] for key in _KEPT if key in given}}
    return {**found, "tool_calls": _calls(calls, column)} if calls else found


def _calls(value: Any, column: str) -> list[dict[str, Any]]:
    """Tool calls in the form that templates read, whose arguments are mappings."""
    try:
        calls = json.loads(value) if isinstance(value, str) else value
        found = []
        for call in calls if isinstance(calls, list) else [calls]:
            function = call.get("function") or call
            arguments = function.get("arguments") or {}
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            if not isinstance(function["name"], str) or not isinstance(arguments, dict):
                raise TypeError
            known = {"id": call["id"]} if call.get("id") else {}
            found.append({**known, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        wanted = 'expected tool calls such as {"name": "search", "arguments": {"title": "Alien"}}'
        raise BadValue(column, f"{wanted}, got %s", value) from None
    return found


def one_kind(row: Mapping[str, Any]) -> bool:
    """Return whether the values of a row are lists of messages. Raises `BadValue` if only some of them are lists."""
    kinds = {isinstance(value, list) for value in row.values()}
    if len(kinds) > 1:
        seen = ", ".join(f"{name} is a {kind_of(value)}" for name, value in row.items())
        raise BadValue(None, f"{seen}; write all of them as texts, or all of them as lists of messages")
    return kinds == {True}


# --- as tokens ---


def read_template(path: str) -> str:
    """The chat template in a file. Raises `DataError`."""
    if (what := irregular(Path(path))) is not None:
        raise FileError(f"chat_template: {path} is {what}; pass a file with a template")
    try:
        found = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"chat_template: {path} cannot be read ({problem}); pass a file with a template") from None
    try:
        parsed = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_MARK.sub("", found))
    except jinja2.TemplateSyntaxError as problem:
        said = f"chat_template: {path} is no template of Jinja: line {problem.lineno}: {problem.message}"
        raise DataError(f"{said}; correct it, or pass another file") from None
    if not any(name.name == "messages" for name in parsed.find_all(jinja2.nodes.Name)):
        raise DataError(f"chat_template: {path} writes no messages; pass a file with a template for conversations")
    return found


def rendered(tokenizer: Any, messages: Messages, **settings: Any) -> Any:
    """A conversation by the tokenizer's template, with the tools that its first message has."""
    try:
        return tokenizer.apply_chat_template(_plain(messages), tools=_tools(messages), **settings)
    except TypeError as problem:  # as where a template joins a text and the arguments of a call
        raise jinja2.TemplateError(str(problem)) from problem


def _plain(messages: Messages) -> list[dict[str, Any]]:
    return [{name: value for name, value in each.items() if name != "tools"} for each in messages]


def _tools(messages: Messages) -> Any:
    return messages[0].get("tools") if messages else None


def refuse_lost(prompts: Sequence[str | Messages], loaded: Pretrained) -> None:
    """Raise `DataError` if the tokenizer's template leaves out the system prompt or the tools of conversations."""
    chats = [each for each in prompts if not isinstance(each, str)]
    systems = (each for each in chats if any(message["role"] == "system" for message in each))
    for messages in filter(None, (next(systems, None), next(filter(_tools, chats), None))):
        try:
            text, bare = (rendered(loaded.processor, each, tokenize=False) for each in (messages, _plain(messages)))
        except jinja2.TemplateError:  # said where the conversations are encoded
            return
        is_lost = any(each["content"].strip() not in text for each in messages if each["role"] == "system")
        lost = "the system prompt" if is_lost else "the tools" if _tools(messages) and text == bare else ""
        if lost:
            raise DataError(
                f"the chat template of {loaded.source!r} leaves out {lost} of the conversation that begins with "
                f"{shown(messages[0]['content'])}; pass another template with --set chat_template=FILE, or write it "
                "into the first message of the user"
            )


def dataset_of(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Rows for TRL's trainers, which tokenize them: there, tools are in a column of their own."""
    import datasets

    chats = [[value for value in row.values() if isinstance(value, list)] for row in rows]
    if not any({*message} - {"role", "content"} for row in chats for messages in row for message in messages):
        return datasets.Dataset.from_list(list(rows))
    moved = [
        {name: _plain(value) if isinstance(value, list) else value for name, value in row.items()}
        | {"tools": json.dumps(next(filter(None, map(_tools, chat)), None))}
        for row, chat in zip(rows, chats, strict=True)
    ]
    # Otherwise messages and arguments would all have the same keys, those of others as None.
    return datasets.Dataset.from_list(moved, on_mixed_types="use_json")


def encode_turns(conversations: Sequence[Messages], loaded: Pretrained) -> Any:
    """Tokenize conversations by the tokenizer's template, with labels for the assistant's turns alone.

    A template that marks these turns (``{% generation %}``) decides what is learned, unless its marks leave out the
    token that ends a turn: a model that does not learn it would never stop. Otherwise a turn begins where the template
    would let the model begin, and ends with what the template writes after an answer. Raises `DataError` if the
    template refuses a conversation, or does not show an answer as it is.
    """
    import datasets
    from trl.chat_template_utils import has_generation_markers, is_chat_template_stop_token_trained

    tokenizer = loaded.processor
    # Tokenizers in Python do not say which tokens are between the marks.
    is_marked = tokenizer.is_fast and has_generation_markers(tokenizer.chat_template)
    encode = _by_marks if is_marked and is_chat_template_stop_token_trained(tokenizer) else _by_turns
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for messages in conversations:
        try:
            ids, learned = encode(messages, tokenizer)
        except jinja2.TemplateError as problem:
            raise DataError(
                f"the chat template of {loaded.source!r} does not take the conversation that begins with "
                f"{shown(messages[0]['content'])}: {problem}; change it, or pass --set train_on_prompts=true to learn "
                "whole conversations"
            ) from problem
        columns["input_ids"].append(ids)
        columns["labels"].append(
            [each if is_learned else NOT_LEARNED for each, is_learned in zip(ids, learned, strict=True)]
        )
    return datasets.Dataset.from_dict(columns)


def _by_marks(messages: Messages, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation, and which of them the template's marks enclose."""
    found = rendered(tokenizer, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    return found["input_ids"], [bool(each) for each in found["assistant_masks"]]


def _by_turns(messages: Messages, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation, and which of them are the assistant's by their place in the text."""

    def render(messages: Messages, **settings: Any) -> str:
        return str(rendered(tokenizer, messages, tokenize=False, **settings))

    text = render(messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    ids: list[int] = encoded["input_ids"]
    ends = [end for _, end in encoded["offset_mapping"]] if tokenizer.is_fast else []

    def before(place: int) -> int:
        """How many tokens end before a place in the text, or at it. Tokenizers in Python do not say where one ends."""
        if tokenizer.is_fast:
            return bisect_right(ends, place)
        return _same_start(tokenizer(text[:place], add_special_tokens=False)["input_ids"], ids)

    learned = [False] * len(ids)
    for start, stop in assistant_spans(messages, text, render):
        # A token across the start of a turn is learned; one across its end belongs to what follows.
        first, last = before(start), before(stop)
        learned[first:last] = [True] * (last - first)
    return ids, learned


def assistant_spans(messages: Messages, text: str, render: Render) -> Iterator[tuple[int, int]]:
    """Yield where each answer starts and stops in a conversation's text, with what ends the turn."""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(messages[:number], add_generation_prompt=True) if number else ""
        placed, what = {**message, "content": _PLACE}, ""
        if "tool_calls" in message:  # found by the end of the messages up to it, or by the name of what is called
            first, *rest = message["tool_calls"]
            whole, begin = render(messages[: number + 1]), _same_start(prompt, text)
            if text.startswith(whole) and first["function"]["name"] in whole[begin:]:
                yield begin, len(whole)
                continue
            named = {**first, "function": {**first["function"], "name": _PLACE}}
            placed, what = {**message, "tool_calls": [named, *rest]}, "the tool calls of "
        before, *after = render([*messages[:number], placed, *messages[number + 1 :]]).split(_PLACE)
        # What the template adds between its prompt for an answer and the answer, such as a thought, is learned.
        is_whole = prompt and text.startswith(prompt)
        start = len(prompt) if is_whole else _same_start(prompt if what else before, text)
        if len(after) != 1 or not text.endswith(after[0]):
            raise jinja2.TemplateError(f"it does not show {what}message {number + 1} as one text")
        # What ends a turn is what stands behind a last one; some templates write more between turns.
        closing = render([*messages[:number], placed]).partition(_PLACE)[2]
        yield start, len(text) - len(after[0]) + _same_start(closing, after[0])


def _same_start(first: Sequence[object], second: Sequence[object]) -> int:
    """How many elements are the same at the start of both."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((number for number, (one, other) in pairs if one != other), min(len(first), len(second)))
