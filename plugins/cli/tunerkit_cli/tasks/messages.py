"""Conversations as lists of messages, in TRL's form: a role and a content, and perhaps tool calls. It imports no torch.

Rows in ShareGPT's form become such ones. The first message of a conversation also holds its ``tools``.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tunerkit_cli.rows import BadRowsError, BadValue, Table

Messages = list[dict[str, Any]]
_Row = Mapping[str, Any]
_ROLES: Final = ("system", "user", "assistant", "tool")
_OUR_ROLE: Final = {name: name for name in _ROLES} | {
    **{"developer": "system", "human": "user", "gpt": "assistant", "function_call": "assistant"},
    **{"observation": "tool", "function_response": "tool"},
}
_KEPT: Final = ("name", "tool_call_id", "reasoning_content", "thinking", "tools")


def messages_of(value: object, column: str) -> Messages:
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
        content = _text_of(content, column)
    if not isinstance(role, str) or role not in _OUR_ROLE or not isinstance(content, str):
        raise BadValue(column, f"expected a role of {', '.join(_ROLES)} and a text, got %s", value)
    found = {"role": _OUR_ROLE[role], "content": content, **{key: given[key] for key in _KEPT if key in given}}
    return {**found, "tool_calls": _calls(calls, column)} if calls else found


def _text_of(parts: Sequence[object], column: str) -> str:
    """The text of a content in parts."""
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise BadValue(column, "has images or sound beside text, which no task reads, in %s; remove the row", parts)
    return "".join(map(str, texts))


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


def one_kind(row: _Row) -> bool:
    """Return whether the values of a row are lists of messages. Raises `BadValue` if only some of them are lists."""
    kinds = {isinstance(value, list) for value in row.values()}
    if len(kinds) > 1:
        seen = ", ".join(f"{name} is a {_kind(value)}" for name, value in row.items())
        raise BadValue(None, f"{seen}; write all of them as texts, or all of them as lists of messages")
    return kinds == {True}


def refuse_mixed(rows: Sequence[_Row], table: Table, names: Mapping[str, str]) -> None:
    """Raise `BadRowsError` for rows with texts where most rows have lists of messages, or the other way round."""
    bad: dict[int, BadValue] = {}
    for name in rows[0]:
        kinds = [_kind(row[name]) for row in rows]
        usual = max(dict.fromkeys(kinds), key=kinds.count)  # of as many, the first row's
        said = f", and row {table.number(kinds.index(usual))} has a {usual}"
        do = "write all rows as texts, or all as lists of messages"
        for place, kind in enumerate(kinds):
            if kind != usual:
                bad.setdefault(place, BadValue(name, f"is a {kind}{said}; {do}"))
    if bad:
        raise BadRowsError(table, names, bad)


def _kind(value: object) -> str:
    return "list" if isinstance(value, list) else "text"
