"""The base of every method's config, its strict checks, and its way from and to plain mappings."""

# No `from __future__ import annotations` here: the checks read the annotations as types.
import math
import re
import reprlib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, Literal, NoReturn, TypeVar, Union, cast, get_args, get_origin

import attrs
import torch
from cattrs import Converter, IterableValidationError, IterableValidationNote, transform_error

from tunerkit.errors import ConfigError, closest

Config = TypeVar("Config", bound="AdapterConfig")
_COMPARE: Final[Mapping[str, tuple[str, Callable[[float, float], bool]]]] = {
    "ge": (">=", lambda value, limit: value >= limit),
    "gt": (">", lambda value, limit: value > limit),
    "le": ("<=", lambda value, limit: value <= limit),
    "lt": ("<", lambda value, limit: value < limit),
}
_SCIENTIFIC: Final = re.compile(r"([+-]?)(\d+)(?:\.(\d*))?[eE]([+-]?)(\d+)")
_REPR: Final = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80


def setting(
    default: Any = attrs.NOTHING,
    *,
    doc: str,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    converter: Callable[[Any], Any] | None = None,
) -> Any:
    """A field of a config: its default, what it means, and the range its numbers lie in.

    The range holds for every number in the field: in a tuple or a mapping for each value, and ``None`` is exempt.
    ``converter`` runs before the checks, and also on values that come from a file; what it does not know, it returns
    unchanged, so that the check can say what is wrong.

    The return type is ``Any`` so that a type checker takes the annotation's word: ``rank: int = setting(8, ...)``.
    """
    metadata = {"doc": doc, "ge": ge, "gt": gt, "le": le, "lt": lt, "converter": converter}
    return attrs.field(default=default, metadata=metadata)


def _dtype_name(value: object) -> object:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


@attrs.frozen(kw_only=True)
class AdapterConfig:
    """What every method's config says; methods derive from it and add their own settings.

    It is abstract: derive from it with ``@attrs.frozen``. Own fields may then be positional::

        @attrs.frozen
        class LoraConfig(AdapterConfig):
            rank: int = setting(8, ge=1, doc="The rank of every update.")

    A field's annotation is made of ``bool``, ``int``, ``float``, ``str``, ``None``, ``Literal[...]``, ``tuple[...]``,
    ``Mapping[str, ...]`` and unions of these, so that every config can be written as JSON. Building a config checks
    all of it and raises one `ConfigError` that names every problem. Lists become tuples, mappings are copied.
    """

    targets: str | tuple[str, ...] | None = setting(
        None,
        doc="Which layers get an adapter: path suffixes, globs, 're:' patterns, or 'all-linear'; "
        "None takes the architecture's default.",
    )
    exclude: tuple[str, ...] = setting((), doc="Targets to leave out, written like `targets`.")
    layers: tuple[int, ...] | None = setting(None, doc="Indices of the layers to adapt; None means all.")
    train_modules: tuple[str, ...] = setting((), doc="Modules trained in full, as copies (a new head).")
    bias: Literal["none", "adapters", "all"] = setting(
        "none", doc="Which biases are trained, as copies: none, those of the adapted layers, or all."
    )
    adapter_dtype: Literal["float32", "float64", "bfloat16", "float16"] = setting(
        "float32", converter=_dtype_name, doc="The dtype of the adapter's weights; a torch.dtype will do."
    )

    @classmethod
    def __attrs_init_subclass__(cls) -> None:
        if cls.__attrs_post_init__ is not AdapterConfig.__attrs_post_init__:
            raise TypeError(f"{cls.__name__} overrides __attrs_post_init__, which checks it; override problems()")
        for field in attrs.fields(attrs.resolve_types(cls)):
            if not _is_supported(field.type):
                raise TypeError(
                    f"{cls.__name__}.{field.name} is annotated {_described(field.type)}, which a config cannot hold; "
                    "use bool, int, float, str, None, Literal, tuple[...], Mapping[str, ...] or a union of these"
                )

    def __attrs_pre_init__(self) -> None:
        if "__attrs_attrs__" not in type(self).__dict__:
            raise TypeError(f"{type(self).__name__} is not an attrs class: decorate it with @attrs.frozen")
        if type(self) is AdapterConfig:
            raise TypeError("AdapterConfig is abstract: build the config of a method, such as LoraConfig")

    def __attrs_post_init__(self) -> None:
        check(self)

    def target_patterns(self) -> Iterable[tuple[str, str]]:
        """(pattern, field) of every pattern that must match one of the chosen targets, for methods to override."""
        return ()

    def problems(self) -> Iterable[str]:
        """The problems across fields, for methods to override; asked only once each field is right by itself.

        Each is one line that ends in the path: ``"expected init_rank <= 8, got 12 @ $.init_rank"``.
        """
        return ()


def check(config: AdapterConfig) -> None:
    """Hold every field against its annotation and range, then ask ``config.problems()``.

    Called while the config is built, which is why it may still bring values into their one form (list to tuple, the
    int in a float field to float). Raises `ConfigError` with all problems.
    """
    found: list[str] = []
    for field in _settings(type(config)):
        value, problems = _read(field, getattr(config, field.name))
        object.__setattr__(config, field.name, value)
        found += problems
    found = found or list(config.problems())
    if found:
        raise ConfigError(found)


def structure(cls: type[Config], mapping: object) -> Config:
    """The config that ``mapping`` (from JSON, YAML or a file's header) describes.

    Nothing is guessed: no text for numbers or lists, no bool for int, no unknown or non-text keys.
    Raises `ConfigError` with every problem and its path.
    """
    _refuse_non_config(cls)
    if not isinstance(mapping, Mapping):
        raise ConfigError([f"expected a mapping of settings, {_got(mapping)} @ $"])
    fields = {field.name: field for field in _settings(cls)}
    problems = [_unknown(key, fields) for key in mapping if key not in fields]
    for name, field in fields.items():
        if name not in mapping and field.default is attrs.NOTHING:
            problems.append(f"missing, and it has no default @ $.{name}")
    if not problems:
        return cls(**{str(field.alias): mapping[name] for name, field in fields.items() if name in mapping})
    for name, field in fields.items():
        if name in mapping:
            problems += _read(field, mapping[name])[1]
    raise ConfigError(problems)


def unstructure(config: AdapterConfig) -> dict[str, Any]:
    """``config`` as plain dicts, lists, strings and numbers, with every setting: `structure` takes it back."""
    _refuse_non_config(type(config))
    return {field.name: _CONVERTER.unstructure(getattr(config, field.name)) for field in _settings(type(config))}


def _settings(cls: type[AdapterConfig]) -> Iterator["attrs.Attribute[Any]"]:
    return (field for field in attrs.fields(cls) if field.init)


def _refuse_non_config(cls: object) -> None:
    if not (isinstance(cls, type) and issubclass(cls, AdapterConfig)):
        raise TypeError(f"expected a config class derived from tunerkit.AdapterConfig, got {cls!r}")


def _unknown(key: object, names: Iterable[str]) -> str:
    if not isinstance(key, str):
        return f"expected str keys, {_got(key)} @ $"
    return f"unknown key {key!r}{closest(key, names) or '; known are ' + ', '.join(names)} @ $.{key}"


def _read(field: "attrs.Attribute[Any]", value: object) -> tuple[object, list[str]]:
    """``value`` as ``field`` stores it, and what is wrong with it."""
    path = f"$.{field.name}"
    convert = field.metadata.get("converter")
    try:
        read = _CONVERTER.structure(value if convert is None else convert(value), cast(Any, field.type))
    except Exception as error:  # cattrs raises groups, a plugin's converter anything: all become lines
        return value, transform_error(error, path, lambda problem, _: str(problem))
    return read, list(_out_of_range(read, field.metadata, path))


def _out_of_range(value: object, limits: Mapping[str, Any], path: str) -> Iterator[str]:
    if isinstance(value, (tuple, dict)):
        for key, element in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _out_of_range(element, limits, f"{path}[{key!r}]")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        for name, (sign, holds) in _COMPARE.items():
            limit = limits.get(name)
            if limit is not None and not holds(value, limit):
                yield f"expected {sign} {limit}, got {_REPR.repr(value)} @ {path}"


# What follows makes the one strict converter. cattrs' defaults read "q_proj" as a list of letters, 8.9 as 8, True as 1.


class _WrongKindError(ValueError):
    """The value is of another kind than the annotation; in a union, another member may still take it."""


def _got(value: object) -> str:
    """``got str '8'``, on one line and short."""
    shown = re.sub(r"\s*\n\s*", " ", _REPR.repr(value))
    return "got None" if value is None else f"got {type(value).__name__} {shown}"


def _refuse(value: object, cls: object) -> NoReturn:
    raise _WrongKindError(f"expected {_described(cls)}, {_got(value)}{_yaml_hint(value, cls)}")


def _yaml_hint(value: object, cls: object) -> str:
    """How YAML 1.1 wants a float written: with a dot, and a sign in the exponent."""
    found = _SCIENTIFIC.fullmatch(value) if isinstance(value, str) else None
    if found is None or float not in (cls, *get_args(cls)):
        return ""
    sign, whole, fraction, exponent_sign, exponent = found.groups()
    return f" (YAML reads this as text: write {sign}{whole}.{fraction or '0'}e{exponent_sign or '+'}{exponent})"


def _described(cls: Any) -> str:
    """An annotation in the words of errors: ``list of str``, for tuples are lists in JSON and YAML."""
    members = get_args(cls)
    if _is_union(cls):
        return " or ".join(map(_described, members))
    if _is_literal(cls):
        return " or ".join(map(repr, members))
    if _is_tuple(cls) and members:
        return f"list of {' and '.join(_described(member) for member in members if member is not Ellipsis)}"
    if _is_mapping(cls) and members:
        return f"mapping of {_described(members[0])} to {_described(members[1])}"
    return "None" if cls is types.NoneType else getattr(cls, "__name__", repr(cls))


def _is_union(cls: Any) -> bool:
    return get_origin(cls) in (Union, types.UnionType)


def _is_literal(cls: Any) -> bool:
    return get_origin(cls) is Literal


def _is_tuple(cls: Any) -> bool:
    return get_origin(cls) is tuple


def _is_mapping(cls: Any) -> bool:
    return get_origin(cls) in (dict, Mapping)


def _is_supported(cls: Any) -> bool:
    members = get_args(cls)
    if _is_literal(cls):
        return all(type(member) in (bool, int, str, types.NoneType) for member in members)
    if _is_mapping(cls):
        return members[0] is str and _is_supported(members[1])
    if _is_union(cls) or _is_tuple(cls):
        return all(_is_supported(member) for member in members if member is not Ellipsis)
    return cls in (bool, int, float, str, types.NoneType)


def _exact(value: object, cls: type) -> object:
    return value if type(value) is cls else _refuse(value, cls)


def _int(value: object, cls: type) -> int:
    # int() strips subclasses (an IntEnum), which YAML cannot write.
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else _refuse(value, cls)


def _float(value: object, cls: type) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _refuse(value, cls)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"expected a finite float, {_got(value)}")
    return number


def _str(value: object, cls: type) -> str:
    return str.__str__(value) if isinstance(value, str) else _refuse(value, cls)


def _literal(value: object, cls: Any) -> object:
    # Types first: True == 1, but Literal[1] must not take it; and comparing an array gives an array.
    for member in get_args(cls):
        if isinstance(value, type(member)) and isinstance(value, bool) == isinstance(member, bool) and value == member:
            return member
    _refuse(value, cls)


def _union(value: object, cls: Any) -> object:
    errors: list[Exception] = []
    # float comes last because it takes ints too: `float | int` keeps 8 an int.
    for member in sorted(get_args(cls), key=lambda member: member is float):
        try:
            return _CONVERTER.structure(value, member)
        except Exception as error:
            errors.append(error)
    # A member of the right kind knows best what is wrong, such as which element of a list.
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
        raise ValueError(f"expected {_described(cls)}, got {len(value)} values")
    return tuple(_each(zip(range(len(value)), value, members, strict=True), cls))


def _mapping(value: object, cls: Any) -> dict[str, object]:
    if not isinstance(value, Mapping):
        _refuse(value, cls)
    key_type, value_type = get_args(cls)
    keys = cast(list[str], _each(((key, key, key_type) for key in value), cls))
    return dict(zip(keys, _each(((key, value[key], value_type) for key in value), cls), strict=True))


def _each(elements: Iterable[tuple[Any, object, Any]], cls: Any) -> list[object]:
    """Structures (index or key, value, type) one by one; the notes are what `cattrs.transform_error` makes paths of."""
    read: list[object] = []
    errors: list[Exception] = []
    for index, value, member in elements:
        try:
            read.append(_CONVERTER.structure(value, member))
        except Exception as error:
            error.add_note(IterableValidationNote(f"at {index!r}", index, member))
            errors.append(error)
    if errors:
        raise IterableValidationError(f"while structuring {_described(cls)}", errors, cls)
    return read


def _strict_converter() -> Converter:
    # Lists for tuples, said here because the default has changed between versions of cattrs.
    converter = Converter(unstruct_collection_overrides={tuple: list})
    for scalar, hook in ((bool, _exact), (types.NoneType, _exact), (int, _int), (float, _float), (str, _str)):
        converter.register_structure_hook(scalar, hook)
    containers = ((_is_literal, _literal), (_is_union, _union), (_is_tuple, _tuple), (_is_mapping, _mapping))
    for is_kind, hook in containers:
        converter.register_structure_hook_func(is_kind, hook)
    return converter


_CONVERTER: Final = _strict_converter()
