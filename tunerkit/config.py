"""Method configs: their base class, strict checks, and conversion from and to mappings.

Nothing is guessed, unlike in cattrs by default, which reads "q_proj" as a list of letters, 8.9 as 8, and True as 1.
Errors name the value found and the values allowed.
"""

# Without `from __future__ import annotations`: the checks need annotations that are types, not strings.
import functools
import inspect
import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum, EnumMeta
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, Literal, Self, TypeVar, Union, cast, get_args, get_origin

import attrs
import torch
from cattrs import Converter, IterableValidationError
from torch import nn

from tunerkit.errors import ConfigError, closest, cut, shown
from tunerkit.extras import hints

Config = TypeVar("Config", bound="AdapterConfig")
Fields = Mapping[str, "attrs.Attribute[Any]"]
_NAMED: Final = 10  # unknown keys that an error lists
_USUAL: Final = 1024  # a config without a number above this asks for a usual amount of memory
_COMPARE: Final = {
    "ge": (">=", operator.ge),
    "gt": (">", operator.gt),
    "le": ("<=", operator.le),
    "lt": ("<", operator.lt),
}
TAG: Final = "type"  # the key that names the class of a mapping, if an annotation allows several classes
_PLAIN: Final = (bool, int, float, str, NoneType)
# The results of `get_origin` for annotations with members.
_UNIONS: Final = (Union, UnionType)
_MAPPINGS: Final = (dict, Mapping)
_SETS: Final = (set, frozenset)
_LISTS: Final = (tuple, list, *_SETS)
_SCIENTIFIC: Final = re.compile(r"([+-]?\d+)(?:\.(\d*))?[eE]([+-]?)(\d+)")


def setting(
    default: Any = attrs.NOTHING,
    *,
    doc: str,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    converter: Callable[[Any], Any] | None = None,
    aka: tuple[str, ...] = (),
) -> Any:
    """Define a config field: its default, its meaning and its range.

    The range applies to every number in the field, including each value of a list or mapping. ``None`` is exempt.
    The return type is ``Any``, so that type checkers use the annotation: ``rank: int = setting(8, ...)``.

    Args:
        default: The default value, or an ``attrs.Factory``. Without one, the setting is required.
        doc: What the setting does, for users.
        ge: Values must be at least this.
        gt: Values must be above this.
        le: Values must be at most this.
        lt: Values must be below this.
        converter: Applied before the checks, also to values from a file. It must return values that it cannot convert
            unchanged, so that the check can report them.
        aka: The setting's names in other libraries. The error about such a key suggests this setting.

    Returns:
        An attrs field.
    """
    metadata = {"doc": doc, "ge": ge, "gt": gt, "le": le, "lt": lt, "converter": converter, "aka": aka}
    return attrs.field(default=default, metadata=metadata)


def _dtype_name(value: object) -> object:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


@attrs.frozen(kw_only=True)
class AdapterConfig:
    """The settings of every method. A method's config class derives from it and adds its own settings.

    The class is abstract. Derive from it with ``@attrs.frozen``; the new fields may be positional::

        @attrs.frozen
        class LoraConfig(AdapterConfig):
            rank: int = setting(8, ge=1, doc="The rank of every update.")

    Annotations may use ``bool``, ``int``, ``float``, ``str``, ``None``, ``Literal[...]``, ``Enum``, ``Path``, attrs
    classes, tuples, lists, sets and ``Mapping[str, ...]`` of these, and unions, so that every config can be written as
    JSON. Building a config checks and copies all fields. The ``doc`` of each field explains it.

    Raises:
        ConfigError: Some fields are invalid; the error lists every problem.
        TypeError: The derived class is not an attrs class, or one of its annotations is not supported.
    """

    targets: str | tuple[str, ...] | None = setting(
        None,
        doc="Which layers get an adapter: path suffixes, globs, 're:' patterns, or 'all-linear'; "
        "None takes the architecture's default.",
        aka=("target_modules",),
    )
    exclude: tuple[str, ...] = setting(
        (), doc="Targets to leave out, and new modules to keep frozen.", aka=("exclude_modules",)
    )
    layers: tuple[int, ...] | None = setting(
        None, doc="Numbers of the layers to adapt; None means all.", aka=("layers_to_transform",)
    )
    train_modules: tuple[str, ...] = setting(
        (), doc="Modules trained in full, as copies; if empty, new heads are.", aka=("modules_to_save",)
    )
    bias: Literal["none", "adapters", "all"] = setting(
        "none", doc="Which biases are trained, as copies: none, those of the adapted layers (adapters), or all."
    )
    adapter_dtype: Literal["float32", "float64", "bfloat16", "float16"] = setting(
        "float32", converter=_dtype_name, doc="The dtype of the adapter's weights: a name or a torch.dtype."
    )

    @property
    def total_steps(self) -> int | None:
        """The length of training in optimizer steps; None if the method has no such setting."""
        return None

    @property
    def dropout(self) -> float:
        """The share of the adapter's input that is dropped in training; 0 if the method has no such setting."""
        return 0.0

    @classmethod
    def __attrs_init_subclass__(cls) -> None:
        if cls.__attrs_post_init__ is not AdapterConfig.__attrs_post_init__:
            raise TypeError(f"{cls.__name__} overrides __attrs_post_init__, which checks values; override problems()")
        _check_annotations(cls, ())
        made, fields = cast(Any, cls.__init__), _settings(cls)

        def checked(self: Self, *values: Any, **settings: Any) -> None:
            if unknown := settings.keys() - fields.keys():  # Python's TypeError would have no suggestion
                raise ConfigError([_unknown(key, fields) for key in sorted(unknown)])
            made(self, *values, **settings)

        cls.__init__ = functools.wraps(made)(checked)  # type: ignore[assignment, method-assign]

    def __attrs_pre_init__(self) -> None:
        if "__attrs_attrs__" not in type(self).__dict__:
            raise TypeError(f"{type(self).__name__} is not an attrs class: decorate it with @attrs.frozen")
        if type(self) is AdapterConfig:
            raise TypeError("AdapterConfig is abstract: build the config of a method, such as LoraConfig")

    def __attrs_post_init__(self) -> None:
        # The config is still being built, so this may normalize values: a list to a tuple, an int to a float.
        values, problems = _read(_settings(type(self)), attrs.asdict(self, recurse=False))
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if found := problems or list(self.problems()):
            raise ConfigError(found)

    def target_patterns(self) -> Iterable[tuple[str, str]]:
        """Override this if settings contain target patterns. `tunerkit.wrap` rejects a pattern that matches no target.

        Returns:
            Pairs of a pattern and the name of its field.
        """
        return ()

    def problems(self) -> Iterable[str]:
        """Override this to check fields against each other. It is called after each field was found valid by itself.

        Returns:
            One line per problem, which ends in the path: ``"expected init_rank <= 8, got 12 @ $.init_rank"``.
        """
        return ()

    def for_model(self, model: nn.Module) -> Self:
        """Override this if some defaults depend on the model, such as its special tokens.

        `tunerkit.wrap` calls this once. Files store the result, so that loading does not depend on the base model.

        Args:
            model: The model to wrap, which must not be changed.

        Returns:
            A config with such defaults made explicit.
        """
        return self

    def settled(self) -> Self:
        """Override this if some defaults depend on other settings.

        Files store the result, so that an adapter does not change if a later version computes other defaults.

        Returns:
            A config in which the resolved defaults are explicit.
        """
        return self


def from_mapping(cls: type[Config], mapping: object) -> Config:
    """Build a config of class ``cls`` from ``mapping``. Raises `ConfigError` with every problem and its path."""
    fields = _settings(cls)
    if not isinstance(mapping, Mapping):
        raise ConfigError([f"expected a mapping of settings, {_got(mapping)} @ $"])
    return cls(**_arguments(fields, mapping))


# Any: a plugin defines the class of a format's options.
def options_from(cls: Any, given: object) -> Any:
    """Build an object of an attrs class from a mapping, or from an object of that class, with the checks of a config.

    Raises `ConfigError` with every problem.
    """
    if type(given) is cls:
        given = attrs.asdict(cast(Any, given), recurse=False, filter=lambda field, _: field.init)
    if not isinstance(given, Mapping):
        raise _WrongKindError(given, cls)
    arguments = _arguments(_fields(cls), given)
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:  # from an attrs validator
        raise ConfigError([f"{error} @ $"]) from error


def _arguments(fields: Fields, mapping: Mapping[Any, Any]) -> dict[str, Any]:
    """Convert a mapping to a class's keyword arguments. Raises `ConfigError` for unknown, missing or invalid fields."""
    unknown = [key for key in mapping if key not in fields]
    problems = [_unknown(key, fields) for key in unknown[:_NAMED]]  # the search for the closest names takes time
    problems += [f"and {len(unknown) - _NAMED} more unknown keys @ $"] if len(unknown) > _NAMED else []
    required = [name for name, field in fields.items() if field.default is attrs.NOTHING]
    problems += [f"missing, and it has no default @ $.{name}" for name in required if name not in mapping]
    values, wrong = _read(fields, mapping)
    if problems or wrong:
        raise ConfigError([*problems, *wrong])
    return {str(fields[name].alias): value for name, value in values.items()}


def unstructure(config: AdapterConfig) -> dict[str, Any]:
    """Convert a config to a mapping; `structure` reverses it.

    Args:
        config: Any method's config.

    Returns:
        All settings by name, as values that JSON and YAML can hold.
    """
    plain = _CONVERTER.unstructure(config)
    return {name: plain[name] for name in _settings(type(config))}


def _settings(cls: object) -> dict[str, "attrs.Attribute[Any]"]:
    """Return the init fields of a config class by name. Raises `TypeError` if ``cls`` is not a config class."""
    if not (isinstance(cls, type) and issubclass(cls, AdapterConfig)):
        raise TypeError(f"expected a config class derived from tunerkit.plugin.AdapterConfig, got {cls!r}")
    return _fields(cls)


def _fields(cls: Any) -> dict[str, "attrs.Attribute[Any]"]:
    return {field.name: field for field in attrs.fields(attrs.resolve_types(cls)) if field.init}


def _unknown(key: object, fields: Fields) -> str:
    if not isinstance(key, str):
        return f"expected str keys, {_got(key)} @ $"
    known = "; known keys: " + (", ".join(fields) or "none")
    return f"unknown key {shown(key)}{meant(key, fields.values()) or closest(key, fields) or known} @ $.{cut(key, 80)}"


def meant(key: str, fields: Iterable["attrs.Attribute[Any]"]) -> str:
    """Return a hint on another library's setting ``key``: the equivalent field, or other advice; "" if unknown."""
    ours = [repr(field.name) for field in fields if key in field.metadata.get("aka", ())]
    instead = hints("settings").get(key)
    return f"; did you mean {' or '.join(ours)}?" if ours else f"; {instead}" if instead else ""


def _read(fields: Fields, mapping: Mapping[str, Any]) -> tuple[dict[str, object], list[str]]:
    """Return the converted values of the valid settings in ``mapping``, and one line for each invalid setting."""
    values: dict[str, object] = {}
    problems: list[str] = []
    for name, field in fields.items():
        if name in mapping:
            convert = field.metadata.get("converter")
            try:
                given = mapping[name] if convert is None else convert(mapping[name])
                values[name] = _CONVERTER.structure(given, cast(Any, field.type))
            except Exception as error:  # cattrs raises groups, a plugin's converter may raise anything
                problems += _located(error, f"$.{name}")
            else:
                for key, (sign, holds) in _COMPARE.items():
                    limit: Any = field.metadata.get(key)
                    for path, number in numbers_in(values[name], f"$.{name}") if limit is not None else ():
                        if not holds(number, limit):
                            problems.append(f"expected {sign} {limit}, got {shown(number)} @ {path}")
    return values, problems


def _located(error: Exception, path: str) -> Iterator[str]:
    """Yield one line with its path for each problem in an error, also in list elements and nested classes."""
    if isinstance(error, IterableValidationError):
        for problem, note in error.group_exceptions()[0]:
            yield from _located(problem, f"{path}[{note.index!r}]")
    elif isinstance(error, ConfigError):
        for text, sign, inner in (problem.rpartition(" @ $") for problem in error.problems):
            yield f"{text} @ {path}{inner}" if sign else f"{inner} @ {path}"
    else:
        yield f"{error} @ {path}"


def large_in(config: Mapping[str, object], sizes: Iterable[int] = ()) -> list[str]:
    """Return the paths of the numbers in a config that exceed both the usual settings and all ``sizes``."""
    usual = max([_USUAL, *sizes])
    inside = (found for name, value in config.items() if value for found in numbers_in(value, f"$.{name}"))
    return [path for path, number in inside if number > usual]


def numbers_in(value: object, path: str) -> list[tuple[str, float]]:
    """Return (path, number) for each number in a setting; skip attrs classes, whose fields are checked separately."""
    if isinstance(value, (int, float)):
        return [] if isinstance(value, bool) else [(path, value)]
    if not isinstance(value, (*_LISTS, dict)):
        return []
    inside: Iterable[tuple[object, object]]
    inside = [(shown(key), each) for key, each in value.items()] if isinstance(value, dict) else enumerate(value)
    return [found for key, element in inside for found in numbers_in(element, f"{path}[{key}]")]


# --- The strict converter ---------------------------------------------------------------------------------------------


class _WrongKindError(ValueError):
    """A value does not have the annotated type. In a union, another member may still accept the value."""

    def __str__(self) -> str:
        value, cls = self.args
        hint = _hint(value, (cls, *get_args(cls))) if isinstance(value, str) else ""
        return f"expected {_described(cls)}, {_got(value)}{hint}"


def _got(value: object) -> str:
    """Describe a value in one short line: ``got str '8'``."""
    return "got None" if value is None else f"got {type(value).__name__} {shown(value)}"


def _hint(text: str, kinds: tuple[object, ...]) -> str:
    """Return a hint on a rejected text: how to write a float in YAML, or the closest allowed values; "" without one."""
    found = _SCIENTIFIC.fullmatch(text)
    if found and float in kinds:
        whole, fraction, sign, exponent = found.groups()
        return f" (YAML reads this as text: write {whole}.{fraction or '0'}e{sign or '+'}{exponent})"
    return closest(text, (plain for kind in kinds for plain, _ in _choices(kind) if isinstance(plain, str)))


def _described(cls: Any) -> str:
    """Describe an annotation for an error, such as ``list of str``. A tuple is called a list, as in JSON and YAML."""
    origin, members = get_origin(cls), get_args(cls)
    if origin in _UNIONS:
        return " or ".join(map(_described, members))
    if choices := _choices(cls):
        return " or ".join(repr(plain) for plain, _ in choices)
    if _is_class(cls):
        return f"{cls.__name__} (a mapping of {', '.join(_fields(cls)) or 'nothing'})"
    if origin in _LISTS:
        return f"list of {' and '.join(_described(member) for member in members if member is not Ellipsis)}"
    if origin in _MAPPINGS:
        return f"mapping of {' to '.join(map(_described, members))}"
    if cls is NoneType:
        return "None"
    return cls.__name__ if isinstance(cls, type) else repr(cls)


def _choices(cls: Any) -> list[tuple[Any, Any]]:
    """Return (value in JSON, member) for each member of a Literal or an Enum; empty for other annotations."""
    members = get_args(cls) if get_origin(cls) is Literal else cls if isinstance(cls, EnumMeta) else ()
    return [(member.value if isinstance(member, Enum) else member, member) for member in members]


def _is_class(cls: Any) -> bool:
    return isinstance(cls, type) and attrs.has(cls) and not issubclass(cls, AdapterConfig)


def _check_annotations(cls: Any, outer: tuple[object, ...]) -> None:
    """Raise `TypeError` if a field of ``cls``, which is nested in ``outer``, has an unsupported annotation."""
    for field in attrs.fields(attrs.resolve_types(cls)):
        if not _forms(field.type, (*outer, cls)):
            given = inspect.formatannotation(field.type)
            raise TypeError(
                f"{cls.__name__}.{field.name} is annotated {given}, which a config does not support; use bool, int, "
                "float, str, None, Literal, Enum, Path, a non-recursive attrs class of such fields, list[...], "
                "tuple[...], Mapping[str, ...], set[...] or frozenset[...] of hashable values, or a union whose "
                f"members differ in JSON (attrs classes by the key {TAG!r}, which has the name of the class)"
            )


def _forms(cls: Any, outer: tuple[object, ...]) -> set[tuple[object, object]]:
    """Return (JSON type, Python type) for each kind of value that an annotation allows; empty if it is unsupported."""
    if cls in _PLAIN:
        return {(float, float), (int, int)} if cls is float else {(cls, cls)}
    if cls is Path:
        return {(str, Path)}
    if choices := _choices(cls):
        known = all(math.isfinite(plain) if type(plain) is float else type(plain) in _PLAIN for plain, _ in choices)
        return {(type(plain), type(member)) for plain, member in choices} if known else set()
    if _is_class(cls) and cls not in outer:
        _check_annotations(cls, outer)
        # A union of classes must not have two of one name, nor a field named like the key.
        return {(dict, TAG), (cls.__name__, cls), (TAG, cls if TAG in _fields(cls) else TAG)}
    origin, members = get_origin(cls), [member for member in get_args(cls) if member is not Ellipsis]
    inner = [_forms(member, outer) for member in members]
    forms = {form for each in inner for form in each}
    if not all(inner) or (origin in _SETS and not all(map(_is_hashable, members))):
        return set()
    if origin in _UNIONS:
        return forms if len(dict(forms)) == len(forms) else set()
    if (origin in _LISTS and (members or origin is tuple)) or (origin in _MAPPINGS and members[:1] == [str]):
        outside = dict if origin in _MAPPINGS else list
        is_plain = origin in (tuple, *_MAPPINGS) and all(one is meant for one, meant in forms)
        return {(outside, outside if is_plain else cls)}
    return set()


def _is_hashable(cls: Any) -> bool:
    inner = [field.type for field in _fields(cls).values()] if _is_class(cls) else get_args(cls)
    return (get_origin(cls) or cls).__hash__ is not None and all(map(_is_hashable, inner))


def _scalar(value: Any, cls: Any) -> object:
    if issubclass(cls, Enum):  # cattrs treats an IntEnum as an int
        return _choice(value, cls)
    # Convert subclasses of numbers and str, such as an IntEnum, which YAML cannot write.
    kinds = {float: (int, float), Path: (str, Path)}.get(cls, cls)
    if not isinstance(value, kinds) or (isinstance(value, bool) and cls is not bool):
        raise _WrongKindError(value, cls)
    # The limits of torch: an int may be a size or a seed, a float a factor in fp32. NaN is rejected too.
    if cls is int and not -(2**63) <= value < 2**64:
        raise ValueError(f"expected an int of 64 bits, {_got(value)}")
    if cls is float and not abs(value) <= torch.finfo(torch.float32).max:
        raise ValueError(f"expected a finite float of 32 bits, {_got(value)}")
    if isinstance(value, str):
        value = str.__str__(value)
    return None if cls is NoneType else cls(value)


def _choice(value: object, cls: Any) -> Any:
    # Compare types first: True == 1, but Literal[1] must not accept True. Comparing an array gives an array.
    for member in get_args(cls) or cls:
        plain = member.value if isinstance(member, Enum) else member
        is_alike = isinstance(value, type(plain)) and isinstance(value, bool) == isinstance(plain, bool)
        if value is member or (is_alike and value == plain):
            return member
    raise _WrongKindError(value, cls)


def _union(value: object, cls: Any) -> object:
    if isinstance(value, Mapping) and len(classes := [member for member in get_args(cls) if _is_class(member)]) > 1:
        named = {each.__name__: each for each in classes}
        try:
            name = _choice(value.get(TAG), Literal[tuple(named)])
        except _WrongKindError as error:
            raise ConfigError([f"{error} @ $.{TAG}"]) from None
        return options_from(named[name], {key: each for key, each in value.items() if key != TAG})
    kind, errors = type(value), list[Exception]()
    if isinstance(value, int) and kind is not bool:  # float would accept it too: with `float | int`, 8 stays 8
        kind = int
    for member in (kind,) if kind in get_args(cls) else get_args(cls):
        try:
            return _CONVERTER.structure(value, member)
        except Exception as error:
            errors.append(error)
    # The error of a member with the right type is more precise: it names the element of a list, for example.
    specific = [error for error in errors if not isinstance(error, _WrongKindError)]
    if len(specific) == 1:
        raise specific[0]
    raise _WrongKindError(value, cls)


def _container(cls: Any) -> Callable[[object, Any], object]:
    """Return a hook that reads a list, set or mapping: it checks the type and length, then calls cattrs' own hook."""
    origin, members = get_origin(cls), get_args(cls)
    kinds: Any = Mapping if origin in _MAPPINGS else (list, tuple, *_SETS) if origin in _SETS else (list, tuple)
    # In this converter, cattrs reads the container and the strict converter reads its elements.
    elements = _SCALARS.copy()
    elements.register_structure_hook_func(lambda member: member in members, _CONVERTER.structure)

    def structure(value: Any, _: object) -> object:
        if not isinstance(value, kinds):
            raise _WrongKindError(value, cls)
        if origin is tuple and Ellipsis not in members and len(value) != len(members):
            raise ValueError(f"expected {_described(cls)}, got {len(value)} values")
        found: Any = elements.structure(value, cls)
        if len(found) < len(value):
            raise ValueError(f"expected distinct values, {_got(value)}")
        return found

    return structure


def _written(union: Any) -> Callable[[Any], object]:
    """Return a hook that writes a value of a union; if the union has several classes, it adds the class's name."""
    hooks: dict[Any, Callable[[Any], Any]] = {}
    for member in get_args(union):
        kind = dict if get_origin(member) is Mapping else get_origin(member) or member
        # If a union has several tuples or mappings, these contain plain values only.
        hooks[kind] = _CONVERTER.unstructure if kind in hooks else _CONVERTER.get_unstructure_hook(member)
    classes = [kind for kind in hooks if _is_class(kind)]

    def write(value: Any) -> object:
        plain = hooks.get(type(value), _CONVERTER.unstructure)(value)
        return {TAG: type(value).__name__, **plain} if len(classes) > 1 and type(value) in classes else plain

    return write


def _has_origin(*origins: object) -> Callable[[Any], bool]:
    return lambda cls: get_origin(cls) in origins


# A set is written in the same order in every process: numbers, then all others by their JSON.
_in_order: Final = functools.partial(
    sorted, key=lambda value: (0, value, "") if isinstance(value, (int, float)) else (1, 0, json.dumps(value))
)
# Write tuples as lists. This is explicit because the default differs between versions of cattrs.
_SCALARS: Final = Converter(unstruct_collection_overrides={tuple: list, set: _in_order, frozenset: _in_order})
for scalar in (*_PLAIN, Enum, Path):
    _SCALARS.register_structure_hook(scalar, _scalar)
_SCALARS.register_unstructure_hook(str, lambda text: text.value if isinstance(text, Enum) else text)
_SCALARS.register_unstructure_hook(Path, Path.as_posix)
_CONVERTER: Final = _SCALARS.copy()
_CONVERTER.register_structure_hook_func(_has_origin(Literal), _choice)
_CONVERTER.register_structure_hook_func(_has_origin(*_UNIONS), _union)
_CONVERTER.register_structure_hook_func(_is_class, lambda value, cls: options_from(cls, value))
_CONVERTER.register_structure_hook_factory(_has_origin(*_LISTS, *_MAPPINGS), _container)
_CONVERTER.register_unstructure_hook_factory(_has_origin(*_UNIONS), _written)
