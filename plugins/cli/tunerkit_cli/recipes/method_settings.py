"""The JSON schema of a method's settings, from the annotations, ranges and descriptions of its config's fields."""

from collections.abc import Mapping
from contextlib import suppress
from enum import Enum, EnumMeta
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin

import attrs

import tunerkit
from tunerkit import hooks
from tunerkit.config import TAG, AdapterConfig
from tunerkit.errors import ConfigError

_TYPES: Final[Mapping[type, str]] = {
    **{bool: "boolean", int: "integer", float: "number", str: "string", Path: "string", NoneType: "null"}
}
_LIMITS: Final = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
Schema = dict[str, Any]


def settings_schema(method: str) -> Schema:
    """Return the JSON schema of a mapping of settings. Raises `UnknownMethodError` if no plugin has the method."""
    return schema_of(hooks.registry.get(hooks.registry.named(method)).config)


def schema_of(cls: type[AdapterConfig]) -> Schema:
    """Return the JSON schema of a mapping of settings, by the config class of the method."""
    found = _class(cls, False)
    with suppress(ConfigError):  # a setting without a default
        for name, default in tunerkit.unstructure(cls()).items():
            found["properties"][name]["default"] = default
    return found


def _of(cls: Any, limits: Schema, tagged: bool) -> Schema:
    """Return the schema of an annotation. ``limits`` hold for its numbers; a tagged class has a key with its name."""
    origin, members = get_origin(cls), get_args(cls)
    if origin in (Union, UnionType):
        several = sum(map(attrs.has, members)) > 1
        return {"anyOf": [_of(member, limits, several) for member in members]}
    if origin is Literal or isinstance(cls, EnumMeta):
        return {"enum": [each.value if isinstance(each, Enum) else each for each in members or cls]}
    if origin is tuple and Ellipsis not in members:
        items = [_of(member, limits, False) for member in members]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    if origin in (tuple, list, set, frozenset):
        unique = {"uniqueItems": True} if origin in (set, frozenset) else {}
        return {"type": "array", "items": _of(members[0], limits, False), **unique}
    if origin is not None:
        return {"type": "object", "additionalProperties": _of(members[1], limits, False)}
    if attrs.has(cls):
        return _class(cls, tagged)
    return {"type": _TYPES[cls], **(limits if cls in (int, float) else {})}


def _class(cls: Any, tagged: bool) -> Schema:
    fields = [field for field in attrs.fields(attrs.resolve_types(cls)) if field.init]
    required = [field.name for field in fields if field.default is attrs.NOTHING]
    return {
        "type": "object",
        "properties": {
            **({TAG: {"const": cls.__name__}} if tagged else {}),
            **{field.name: _described(field) for field in fields},
        },
        "required": [*([TAG] if tagged else []), *required],
        "additionalProperties": False,
    }


def _described(field: "attrs.Attribute[Any]") -> Schema:
    limits = {word: field.metadata[key] for key, word in _LIMITS.items() if field.metadata.get(key) is not None}
    doc = field.metadata.get("doc")
    return {**_of(field.type, limits, False), **({"description": doc} if doc else {})}
