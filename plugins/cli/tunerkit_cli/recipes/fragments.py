"""Fragments of JSON schema that describe a recipe's keys: check a value, or a fragment that a plugin wrote."""

import json
from collections.abc import Iterable, Iterator, Mapping
from types import NoneType
from typing import Any, Final

from tunerkit.errors import closest, shown
from tunerkit.paths import few, join

Fragment = Mapping[str, Any]

# What each type is in Python, and in words; nobody is told that None would do.
_TYPES: Final[Mapping[str, tuple[tuple[type, ...], str]]] = {
    "string": ((str,), "text"),
    "integer": ((int,), "a whole number"),
    "number": ((int, float), "a number"),
    "boolean": ((bool,), "true or false"),
    "array": ((list,), "a list"),
    "object": ((dict,), "a mapping"),
    "null": ((NoneType,), ""),
}
_KEYWORDS: Final[Mapping[str, tuple[type, ...]]] = {
    "type": (str, list, tuple),
    "description": (str,),
    "default": (object,),
    "examples": (list, tuple),
    "enum": (list, tuple),
    "minimum": (int, float),
    "maximum": (int, float),
    "minLength": (int,),
    "minItems": (int,),
    "properties": (dict,),
    "items": (dict,),
    "additionalProperties": (bool, dict),
}
_WITHIN: Final = ("items", "additionalProperties")  # keywords whose value may be a fragment


def problems(value: object, fragment: Fragment, where: str = "") -> Iterator[str]:
    """Yield one line for everything in a value at ``where`` that its fragment does not allow.

    What the fragment leaves open must be plain: what JSON can express.
    """
    at = f"{where}: " if where else ""
    kinds = _kinds(fragment)
    if not any(_is(value, kind) for kind in kinds):
        is_plain = any(_is(value, kind) for kind in _TYPES)
        got = shown(value) if is_plain else f"the {type(value).__name__} {value}"[:200]  # the date 2024-01-31
        do = f". {_described(fragment)}".removesuffix(". ")
        if "string" in kinds and not isinstance(value, dict | list):  # a scalar that was meant as text
            do = "; put it in quotes"
        words = [_TYPES[kind][1] for kind in kinds if kind != "null"]
        yield f"{at}expected {_listed(words) if words else 'no value'}, got {got}{do}"
    elif value not in fragment.get("enum", (value,)):
        allowed = [str(each) for each in fragment["enum"] if each is not None]
        yield f"{at}expected {_listed(allowed)}, got {shown(value)}{closest(str(value), allowed)}"
    elif isinstance(value, dict):
        yield from _in_mapping(value, fragment, where, at)
    elif isinstance(value, list):
        if len(value) < fragment.get("minItems", 0):
            yield f"{at}expected {fragment['minItems']} or more values in the list, got {shown(value)}"
        for number, each in enumerate(value):
            yield from problems(each, fragment.get("items", {}), f"{where}[{number}]")
    elif isinstance(value, str) and len(value) < fragment.get("minLength", 0):
        yield f"{at}expected {fragment['minLength']} or more characters, got {shown(value)}"
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if "minimum" in fragment and not value >= fragment["minimum"]:
            yield f"{at}expected at least {fragment['minimum']}, got {shown(value)}"
        if "maximum" in fragment and not value <= fragment["maximum"]:
            yield f"{at}expected at most {fragment['maximum']}, got {shown(value)}"


def _in_mapping(value: dict[Any, Any], fragment: Fragment, where: str, at: str) -> Iterator[str]:
    known = fragment.get("properties", {})
    others = fragment.get("additionalProperties", True)
    for key, each in value.items():
        if not isinstance(key, str):
            yield f"{at}expected text as a key, got {shown(key)}; put it in quotes"
        elif key not in known and others is False:
            keys = f"; the keys are {few(list(known), shown=30) or 'none'}. {_described(fragment)}".removesuffix(". ")
            yield f"{at}unknown key {shown(key)}{closest(key, known) or keys}"
        else:
            yield from problems(each, known.get(key, {} if others is True else others), join(where, key))


def objection(fragment: object) -> str | None:
    """Return what is wrong with a fragment, or None."""
    if not isinstance(fragment, dict):
        return f"expected a dict with JSON schema, got {shown(fragment)}"
    try:
        json.dumps(fragment)
    except (TypeError, ValueError, RecursionError) as problem:
        return f"is not JSON: {problem}"
    for name, value in fragment.items():
        if name not in _KEYWORDS:
            hint = closest(str(name), _KEYWORDS)
            return f"the keyword {shown(name)} is not supported{hint or '; use ' + _listed(_KEYWORDS)}"
        if not isinstance(value, _KEYWORDS[name]):
            return f"{name}: expected a {_listed([kind.__name__ for kind in _KEYWORDS[name]])}, got {shown(value)}"
    if not all(isinstance(kind, str) and kind in _TYPES for kind in _kinds(fragment) or [None]):
        return f"there is no type {shown(fragment['type'])}; use {_listed(_TYPES)}"
    within = [*fragment.get("properties", {}).values(), *(fragment[name] for name in _WITHIN if name in fragment)]
    found = next(filter(None, (objection(each) for each in within if not isinstance(each, bool))), None)
    if found is None and "default" in fragment:
        found = next(problems(fragment["default"], fragment, "default"), None)
    return found


def _kinds(fragment: Fragment) -> tuple[str, ...]:
    kinds = fragment.get("type", tuple(_TYPES))
    return (kinds,) if isinstance(kinds, str) else tuple(kinds)


def _is(value: object, kind: str) -> bool:
    return isinstance(value, _TYPES[kind][0]) and (kind == "boolean" or not isinstance(value, bool))


def _described(fragment: Fragment) -> str:
    return str(fragment.get("description", "")).removesuffix(".")


def _listed(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
