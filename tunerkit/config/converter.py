"""The strict converter: it guesses nothing, and its errors name the value found and the values allowed.

By default, cattrs reads "q_proj" as a list of letters, 8.9 as 8, and True as 1.
"""

import math
import re
import reprlib
import types
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal, NoReturn, Union, cast, get_args, get_origin

from cattrs import Converter, IterableValidationError, IterableValidationNote

from tunerkit.errors import closest

_SCIENTIFIC: Final = re.compile(r"([+-]?)(\d+)(?:\.(\d*))?[eE]([+-]?)(\d+)")
SHORT: Final = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 80


class _WrongKindError(ValueError):
    """The value has a different type from the annotation. Another member of a union may still accept it."""


def got(value: object) -> str:
    """Describe a value in one short line: ``got str '8'``."""
    shown = re.sub(r"\s*\n\s*", " ", SHORT.repr(value))
    return "got None" if value is None else f"got {type(value).__name__} {shown}"


def _refuse(value: object, cls: object) -> NoReturn:
    hint = _yaml_hint(value, cls) or _choice_hint(value, cls)
    raise _WrongKindError(f"expected {described(cls)}, {got(value)}{hint}")


def _yaml_hint(value: object, cls: object) -> str:
    """Show how to write a float in YAML 1.1: with a dot and a signed exponent."""
    found = _SCIENTIFIC.fullmatch(value) if isinstance(value, str) else None
    if found is None or float not in (cls, *get_args(cls)):
        return ""
    sign, whole, fraction, exponent_sign, exponent = found.groups()
    return f" (YAML reads this as text: write {sign}{whole}.{fraction or '0'}e{exponent_sign or '+'}{exponent})"


def _choice_hint(value: object, cls: object) -> str:
    choices = (choice for kind in (cls, *get_args(cls)) if _is_literal(kind) for choice in get_args(kind))
    return closest(value, (choice for choice in choices if isinstance(choice, str))) if isinstance(value, str) else ""


def described(cls: Any) -> str:
    """Describe an annotation for an error, such as ``list of str``: tuples are lists in JSON and YAML."""
    members = get_args(cls)
    if _is_union(cls):
        return " or ".join(map(described, members))
    if _is_literal(cls):
        return " or ".join(map(repr, members))
    if _is_tuple(cls) and members:
        return f"list of {' and '.join(described(member) for member in members if member is not Ellipsis)}"
    if _is_mapping(cls) and members:
        return f"mapping of {described(members[0])} to {described(members[1])}"
    return "None" if cls is types.NoneType else getattr(cls, "__name__", repr(cls))


def _is_union(cls: Any) -> bool:
    return get_origin(cls) in (Union, types.UnionType)


def _is_literal(cls: Any) -> bool:
    return get_origin(cls) is Literal


def _is_tuple(cls: Any) -> bool:
    return get_origin(cls) is tuple


def _is_mapping(cls: Any) -> bool:
    return get_origin(cls) in (dict, Mapping)


def is_supported(cls: Any) -> bool:
    """Whether JSON can hold values of this annotation and the converter can read them."""
    members = get_args(cls)
    if _is_literal(cls):
        return all(type(member) in (bool, int, str, types.NoneType) for member in members)
    if _is_mapping(cls):
        return members[0] is str and is_supported(members[1])
    if _is_union(cls) or _is_tuple(cls):
        return all(is_supported(member) for member in members if member is not Ellipsis)
    return cls in (bool, int, float, str, types.NoneType)


def _exact(value: object, cls: type) -> object:
    return value if type(value) is cls else _refuse(value, cls)


def _int(value: object, cls: type) -> int:
    # int() converts subclasses such as IntEnum, which YAML cannot write.
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else _refuse(value, cls)


def _float(value: object, cls: type) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _refuse(value, cls)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"expected a finite float, {got(value)}")
    return number


def _str(value: object, cls: type) -> str:
    return str.__str__(value) if isinstance(value, str) else _refuse(value, cls)


def _literal(value: object, cls: Any) -> object:
    # Compare types first: True == 1, but Literal[1] must not accept True. Comparing an array gives an array.
    for member in get_args(cls):
        if isinstance(value, type(member)) and isinstance(value, bool) == isinstance(member, bool) and value == member:
            return member
    _refuse(value, cls)


def _union(value: object, cls: Any) -> object:
    errors: list[Exception] = []
    # Try float last, because it also accepts ints: with `float | int`, 8 stays an int.
    for member in sorted(get_args(cls), key=lambda member: member is float):
        try:
            return CONVERTER.structure(value, member)
        except Exception as error:
            errors.append(error)
    # The error of a member with the right type is more precise: it names the element of a list, for example.
    specific = [error for error in errors if not isinstance(error, _WrongKindError)]
    if len(specific) == 1:
        raise specific[0]
    _refuse(value, cls)


def _tuple(value: object, cls: Any) -> tuple[object, ...]:
    members = get_args(cls)
    if not isinstance(value, (list, tuple)):
        _refuse(value, cls)
    if Ellipsis in members:
        members = members[:1] * len(value)
    elif len(value) != len(members):
        raise ValueError(f"expected {described(cls)}, got {len(value)} values")
    return tuple(_each(zip(range(len(value)), value, members, strict=True), cls))


def _mapping(value: object, cls: Any) -> dict[str, object]:
    if not isinstance(value, Mapping):
        _refuse(value, cls)
    key_type, value_type = get_args(cls)
    keys = cast(list[str], _each(((key, key, key_type) for key in value), cls))
    return dict(zip(keys, _each(((key, value[key], value_type) for key in value), cls), strict=True))


def _each(elements: Iterable[tuple[Any, object, Any]], cls: Any) -> list[object]:
    """Structure (index or key, value, type) one by one. `cattrs.transform_error` builds paths from the notes."""
    read: list[object] = []
    errors: list[Exception] = []
    for index, value, member in elements:
        try:
            read.append(CONVERTER.structure(value, member))
        except Exception as error:
            error.add_note(IterableValidationNote(f"at {index!r}", index, member))
            errors.append(error)
    if errors:
        raise IterableValidationError(f"while structuring {described(cls)}", errors, cls)
    return read


def _strict_converter() -> Converter:
    # Write tuples as lists. This is explicit because the default differs between versions of cattrs.
    converter = Converter(unstruct_collection_overrides={tuple: list})
    for scalar, hook in ((bool, _exact), (types.NoneType, _exact), (int, _int), (float, _float), (str, _str)):
        converter.register_structure_hook(scalar, hook)
    containers = ((_is_literal, _literal), (_is_union, _union), (_is_tuple, _tuple), (_is_mapping, _mapping))
    for is_kind, hook in containers:
        converter.register_structure_hook_func(is_kind, hook)
    return converter


CONVERTER: Final = _strict_converter()
