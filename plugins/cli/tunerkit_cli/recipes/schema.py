"""JSON schema: of attrs classes, such as recipes and the settings of methods; and what in a value it does not allow."""

import copy
import json
import operator
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from enum import Enum, EnumMeta
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin

import attrs

import tunerkit
from tunerkit.errors import ConfigError, closest, shown
from tunerkit.paths import few, join

Schema = Mapping[str, Any]

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
_NAMES: Final[Mapping[object, str]] = {Path: "string", **{kinds[-1]: name for name, (kinds, _) in _TYPES.items()}}
_RANGE: Final = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
_BOUNDS: Final = {
    "minimum": ("at least", operator.ge),
    "exclusiveMinimum": ("more than", operator.gt),
    "maximum": ("at most", operator.le),
}
# For each type, the keywords that limit it, by their names in the metadata of a field.
_LIMITS: Final[Mapping[str, Mapping[str, str]]] = {
    **{"integer": {**_RANGE, "enum": "enum"}, "number": _RANGE, "array": {"min_items": "minItems"}},
    "string": {"min_length": "minLength", "enum": "enum"},
}
_TAG: Final = "type"  # the key that names the class of a mapping, where several are allowed


# --- of a class -------------------------------------------------------------------------------------------------------


def settings_schema(cls: Any) -> dict[str, Any]:
    """Return the JSON schema of a mapping of a method's settings, by its config class."""
    found = class_schema(cls)
    with suppress(ConfigError):  # a setting without a default
        for name, default in tunerkit.unstructure(cls()).items():
            found["properties"][name]["default"] = default
    return found


def class_schema(cls: Any, *, tagged: bool = False) -> dict[str, Any]:
    """Return the JSON schema of an attrs class, by its fields' annotations and metadata; a tagged one names itself."""
    fields = [field for field in attrs.fields(attrs.resolve_types(cls)) if field.init]
    required = [field.name for field in fields if field.default is attrs.NOTHING]
    described = {field.name: _of(field.type, field.metadata) for field in fields}
    for field in fields:
        if "doc" in field.metadata:
            described[field.name]["description"] = field.metadata["doc"]
    return {
        "type": "object",
        "properties": {**({_TAG: {"const": cls.__name__}} if tagged else {}), **described},
        "required": [*([_TAG] if tagged else []), *required],
        "additionalProperties": False,
    }


def _of(cls: Any, metadata: Mapping[str, Any], *, tagged: bool = False) -> dict[str, Any]:
    """Return the schema of an annotation, whose plain values and lists have the limits in a field's metadata."""
    origin, members = get_origin(cls), get_args(cls)
    if origin in (Union, UnionType):
        several = sum(map(attrs.has, members)) > 1
        return _any([_of(member, metadata, tagged=several) for member in members])
    if origin is Literal or isinstance(cls, EnumMeta):
        return {"enum": [each.value if isinstance(each, Enum) else each for each in members or cls]}
    if origin is tuple and Ellipsis not in members:
        items = [_of(member, metadata) for member in members]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    if origin in (tuple, list, set, frozenset):
        unique = {"uniqueItems": True} if origin in (set, frozenset) else {}
        return {"type": "array", "items": _of(members[0], metadata), **_limits("array", metadata), **unique}
    if origin is not None:
        return {"type": "object", "additionalProperties": _of(members[1], metadata)}
    if attrs.has(cls):
        return class_schema(cls, tagged=tagged)
    return {} if cls is Any else {"type": _NAMES[cls], **_limits(_NAMES[cls], metadata)}


def _limits(kind: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    limits = _LIMITS.get(kind, {})
    return {word: metadata[name] for name, word in limits.items() if metadata.get(name) is not None}


def _any(members: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the schema of a union: in one mapping, where the types of its members differ."""
    kinds = [each.get("type") for each in members]
    if None in kinds or len({*kinds}) < len(kinds):
        return {"anyOf": members}
    merged = {word: value for each in members for word, value in each.items()}
    others = [kind for kind in kinds if kind != "null"]
    merged["type"] = others[0] if len(others) == 1 else others
    return or_null(merged) if "null" in kinds else merged


def or_null(schema: Schema) -> dict[str, Any]:
    """Return a copy that also allows no value."""
    widened = copy.deepcopy(dict(schema))
    if "type" in widened:
        widened["type"] = list(dict.fromkeys([*kinds_of(widened), "null"]))
    if "enum" in widened:
        widened["enum"] = [*widened["enum"], *([] if None in widened["enum"] else [None])]
    return widened


# --- of a value -------------------------------------------------------------------------------------------------------


def problems(value: object, schema: Schema, where: str = "") -> Iterator[str]:
    """Yield one line for everything in a value at ``where`` that its schema, or JSON, does not allow."""
    at = f"{where}: " if where else ""
    kinds = kinds_of(schema)
    if not any(_is(value, kind) for kind in kinds):
        is_plain = any(_is(value, kind) for kind in _TYPES)
        got = shown(value) if is_plain else f"the {type(value).__name__} {value}"[:200]  # the date 2024-01-31
        do = _described(schema)
        if "string" in kinds and not isinstance(value, dict | list):  # a scalar that was meant as text
            do = "; put it in quotes"
        words = [_TYPES[kind][1] for kind in kinds if kind != "null"]
        yield f"{at}expected {_listed(words) if words else 'no value'}, got {got}{do}"
    elif value not in schema.get("enum", (value,)):
        allowed = [str(each) for each in schema["enum"] if each is not None]
        yield f"{at}expected {_listed(allowed)}, got {shown(value)}{closest(str(value), allowed)}"
    elif isinstance(value, dict):
        yield from _in_mapping(value, schema, where, at)
    elif isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            yield f"{at}expected {schema['minItems']} or more values in the list, got {shown(value)}"
        for number, each in enumerate(value):
            yield from problems(each, schema.get("items", {}), f"{where}[{number}]")
    elif isinstance(value, str) and len(value) < schema.get("minLength", 0):
        yield f"{at}expected {schema['minLength']} or more characters, got {shown(value)}"
    elif isinstance(value, int | float) and not isinstance(value, bool):
        for limit, (said, holds) in _BOUNDS.items():
            if limit in schema and not holds(value, schema[limit]):
                yield f"{at}expected {said} {schema[limit]}, got {shown(value)}"


def _in_mapping(value: dict[Any, Any], schema: Schema, where: str, at: str) -> Iterator[str]:
    known = schema.get("properties", {})
    others = schema.get("additionalProperties", True)
    missing = [key for key in schema.get("required", ()) if key not in value]
    if missing and (others is not False or {*value} <= {*known}):
        yield f"{at}there is no {missing[0]!r}{_described(known[missing[0]])}"
    for key, each in value.items():
        if not isinstance(key, str):
            yield f"{at}expected text as a key, got {shown(key)}; put it in quotes"
        elif key not in known and others is False:
            keys = f"; the keys are {few(list(known), shown=40) or 'none'}{_described(schema)}"
            yield f"{at}unknown key {shown(key)}{closest(key, known) or keys}"
        else:
            yield from problems(each, known.get(key, {} if others is True else others), join(where, key))


def objection(schema: object) -> str | None:
    """Return what is wrong with a schema that a plugin wrote, or None."""
    try:
        plain = json.loads(json.dumps(schema), object_hook=_with_list)
    except (TypeError, ValueError, RecursionError) as problem:
        return f"is not JSON: {problem}"
    found = next(problems(plain, _SCHEMA), None)
    if found is None and isinstance(schema, dict) and "default" in schema:
        return next(problems(schema["default"], schema, "default"), None)
    return found


def _with_list(schema: dict[str, Any]) -> dict[str, Any]:
    return {**schema, "type": [schema["type"]]} if isinstance(schema.get("type"), str) else schema


def kinds_of(schema: Schema) -> tuple[str, ...]:
    """The names of the types that a schema allows."""
    kinds = schema.get("type", tuple(_TYPES))
    return (kinds,) if isinstance(kinds, str) else tuple(kinds)


def _is(value: object, kind: str) -> bool:
    return isinstance(value, _TYPES[kind][0]) and (kind == "boolean" or not isinstance(value, bool))


def _described(schema: Schema) -> str:
    return f". {schema['description']}".removesuffix(".") if schema.get("description") else ""


def _listed(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


# The schema of the schemas that plugins may write, each type in a list: what `problems` checks, and what editors show.
_SCHEMA: Final[dict[str, Any]] = {"type": "object", "additionalProperties": False, "properties": {}}
_SCHEMA["properties"] |= {
    "type": {"type": "array", "items": {"type": "string", "enum": [*_TYPES]}, "minItems": 1},
    **{"description": {"type": "string"}, "default": {}, "examples": {"type": "array"}, "enum": {"type": "array"}},
    **{"minimum": {"type": "number"}, "maximum": {"type": "number"}},
    **{"minLength": {"type": "integer"}, "minItems": {"type": "integer"}},
    **{"properties": {"type": "object", "additionalProperties": _SCHEMA}, "items": _SCHEMA},
    "additionalProperties": {**_SCHEMA, "type": ["boolean", "object"]},
}
