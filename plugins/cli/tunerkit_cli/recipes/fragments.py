"""Fragments of JSON schema that describe a recipe's keys: check a value, or a fragment that a plugin wrote."""

import json
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType, NoneType
from typing import Any, Final

from tunerkit.errors import closest, shown
from tunerkit.paths import few

Fragment = Mapping[str, Any]

_TYPES: Final[Mapping[str, tuple[type, ...]]] = MappingProxyType(
    {
        "string": (str,),
        "integer": (int,),
        "number": (int, float),
        "boolean": (bool,),
        "array": (list,),
        "object": (dict,),
        "null": (NoneType,),
    }
)
_WORDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "string": "text",
        "integer": "a whole number",
        "number": "a number",
        "boolean": "true or false",
        "array": "a list",
        "object": "a mapping",
    }
)
_KEYWORDS: Final[Mapping[str, tuple[type, ...]]] = MappingProxyType(
    {
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
)

_WITHIN: Final = ("items", "additionalProperties")  # keywords whose value may be a fragment


def problems(value: object, fragment: Fragment, where: str = "") -> Iterator[str]:
    """Yield one line for everything in a value that its fragment does not allow.

    Args:
        value: Any value. What the fragment leaves open must be plain: what JSON can express.
        fragment: JSON schema with the keywords that `objection` allows.
        where: The value's place, as in ``training.learning_rate``.
    """
    kinds = _kinds(fragment)
    if not any(_is(value, kind) for kind in kinds):
        yield f"{_at(where)}expected {_either(kinds)}, got {_got(value)}{_note(value, kinds, fragment)}"
    elif value not in fragment.get("enum", (value,)):
        allowed = [str(each) for each in fragment["enum"] if each is not None]
        yield f"{_at(where)}expected {_listed(allowed)}, got {shown(value)}{closest(str(value), allowed)}"
    elif isinstance(value, dict):
        yield from _in_mapping(value, fragment, where)
    elif isinstance(value, list):
        if len(value) < fragment.get("minItems", 0):
            yield f"{_at(where)}expected {fragment['minItems']} or more values in the list, got {shown(value)}"
        for number, each in enumerate(value):
            yield from problems(each, fragment.get("items", {}), f"{where}[{number}]")
    elif isinstance(value, str) and len(value) < fragment.get("minLength", 0):
        yield f"{_at(where)}expected {fragment['minLength']} or more characters, got {shown(value)}"
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield from _out_of_range(value, fragment, where)


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


def _in_mapping(value: dict[Any, Any], fragment: Fragment, where: str) -> Iterator[str]:
    known = fragment.get("properties", {})
    others = fragment.get("additionalProperties", True)
    for key, each in value.items():
        if not isinstance(key, str):
            yield f"{_at(where)}expected text as a key, got {shown(key)}; put it in quotes"
        elif key in known:
            yield from problems(each, known[key], _join(where, key))
        elif others is False:
            yield f"{_at(where)}unknown key {shown(key)}{closest(key, known) or _keys(fragment)}"
        else:
            yield from problems(each, {} if others is True else others, _join(where, key))


def _out_of_range(value: float, fragment: Fragment, where: str) -> Iterator[str]:
    if "minimum" in fragment and not value >= fragment["minimum"]:
        yield f"{_at(where)}expected at least {fragment['minimum']}, got {shown(value)}"
    if "maximum" in fragment and not value <= fragment["maximum"]:
        yield f"{_at(where)}expected at most {fragment['maximum']}, got {shown(value)}"


def _kinds(fragment: Fragment) -> tuple[str, ...]:
    kinds = fragment.get("type", tuple(_TYPES))
    return (kinds,) if isinstance(kinds, str) else tuple(kinds)


def _is(value: object, kind: str) -> bool:
    return isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _got(value: object) -> str:
    """Return a value, with its kind where it is no plain one: ``the date 2024-01-31``."""
    return shown(value) if any(_is(value, kind) for kind in _TYPES) else f"the {type(value).__name__} {value}"[:200]


def _note(value: object, kinds: tuple[str, ...], fragment: Fragment) -> str:
    """Return what to do: a scalar that was meant as text needs quotes; otherwise, what the key is for."""
    if "string" in kinds and not isinstance(value, dict | list):
        return "; put it in quotes"
    return f". {_described(fragment)}" if _described(fragment) else ""


def _keys(fragment: Fragment) -> str:
    """Return which keys a mapping may have, after a message about one that it may not have."""
    known = few(list(fragment.get("properties", ())), shown=30) or "none"
    return f"; the keys are {known}. {_described(fragment)}".removesuffix(". ")


def _described(fragment: Fragment) -> str:
    return str(fragment.get("description", "")).removesuffix(".")


def _either(kinds: Iterable[str]) -> str:
    words = [_WORDS[kind] for kind in kinds if kind in _WORDS]
    return _listed(words) if words else "no value"


def _listed(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _at(where: str) -> str:
    return f"{where}: " if where else ""
