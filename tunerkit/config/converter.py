"""The strict converter: it guesses nothing, and its errors name the value found and the values allowed.

By default, cattrs reads "q_proj" as a list of letters, 8.9 as 8, and True as 1.
"""

import re
import sys
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any, Final, Literal, NoReturn, Union, get_args, get_origin

from cattrs import Converter

from tunerkit.errors import closest, shown

# What `get_origin` returns for the annotations that have members.
_UNIONS: Final = (Union, UnionType)
_MAPPINGS: Final = (dict, Mapping)
_SCIENTIFIC: Final = re.compile(r"([+-]?\d+)(?:\.(\d*))?[eE]([+-]?)(\d+)")


class _WrongKindError(ValueError):
    """The value has a different type from the annotation. Another member of a union may still accept it."""


def got(value: object) -> str:
    """Describe a value in one short line: ``got str '8'``."""
    return "got None" if value is None else f"got {type(value).__name__} {shown(value)}"


def _refuse(value: object, cls: object) -> NoReturn:
    hint = _hint(value, (cls, *get_args(cls))) if isinstance(value, str) else ""
    raise _WrongKindError(f"expected {described(cls)}, {got(value)}{hint}")


def _hint(text: str, kinds: tuple[object, ...]) -> str:
    """Show how to write a float in YAML 1.1, with a dot and a signed exponent, or name the closest choices."""
    found = _SCIENTIFIC.fullmatch(text)
    if found and float in kinds:
        whole, fraction, sign, exponent = found.groups()
        return f" (YAML reads this as text: write {whole}.{fraction or '0'}e{sign or '+'}{exponent})"
    choices = (choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind))
    return closest(text, (choice for choice in choices if isinstance(choice, str)))


def described(cls: Any) -> str:
    """Describe an annotation for an error, such as ``list of str``: tuples are lists in JSON and YAML."""
    origin, members = get_origin(cls), get_args(cls)
    if origin in _UNIONS:
        return " or ".join(map(described, members))
    if origin is Literal:
        return " or ".join(map(repr, members))
    if origin is tuple:
        return f"list of {' and '.join(described(member) for member in members if member is not Ellipsis)}"
    if origin in _MAPPINGS:
        return f"mapping of {' to '.join(map(described, members))}"
    if cls is NoneType:
        return "None"
    return cls.__name__ if isinstance(cls, type) else repr(cls)


def is_supported(cls: Any) -> bool:
    """Whether JSON can hold values of this annotation and the converter can read them."""
    origin, members = get_origin(cls), get_args(cls)
    if origin is Literal:
        return all(type(member) in (bool, int, str, NoneType) for member in members)
    if origin in _MAPPINGS:
        return members[:1] == (str,) and is_supported(members[1])
    if origin in (*_UNIONS, tuple):
        return all(is_supported(member) for member in members if member is not Ellipsis)
    return cls in (bool, int, float, str, NoneType)


def _exact(value: object, cls: type) -> object:
    return value if type(value) is cls else _refuse(value, cls)


def _int(value: object, cls: type) -> int:
    # int() converts subclasses such as IntEnum, which YAML cannot write.
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else _refuse(value, cls)


def _str(value: object, cls: type) -> str:
    return str.__str__(value) if isinstance(value, str) else _refuse(value, cls)


def _float(value: object, cls: type) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _refuse(value, cls)
    if not abs(value) <= sys.float_info.max:  # also if it is NaN, or an int too large for a float
        raise ValueError(f"expected a finite float, {got(value)}")
    return float(value)


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


def _container(cls: Any) -> Callable[[object, Any], object]:
    """Make the hook of a tuple or mapping: it checks kind and length, then calls cattrs' own hook, which adds paths."""
    is_tuple, members = get_origin(cls) is tuple, get_args(cls)
    # In this converter, cattrs reads the container and the strict converter reads its elements.
    elements = _SCALARS.copy()
    elements.register_structure_hook_func(lambda member: member in members, CONVERTER.structure)

    def structure(value: Any, _: object) -> object:
        if not isinstance(value, (list, tuple) if is_tuple else Mapping):
            _refuse(value, cls)
        if is_tuple and Ellipsis not in members and len(value) != len(members):
            raise ValueError(f"expected {described(cls)}, got {len(value)} values")
        return elements.structure(value, cls)

    return structure


def _has_origin(*origins: object) -> Callable[[Any], bool]:
    return lambda cls: get_origin(cls) in origins


# Write tuples as lists. This is explicit because the default differs between versions of cattrs.
_SCALARS: Final = Converter(unstruct_collection_overrides={tuple: list})
for scalar, hook in ((bool, _exact), (NoneType, _exact), (int, _int), (float, _float), (str, _str)):
    _SCALARS.register_structure_hook(scalar, hook)
CONVERTER: Final = _SCALARS.copy()
CONVERTER.register_structure_hook_func(_has_origin(Literal), _literal)
CONVERTER.register_structure_hook_func(_has_origin(*_UNIONS), _union)
CONVERTER.register_structure_hook_factory(_has_origin(tuple, *_MAPPINGS), _container)
