"""The base class of every method's config, its strict checks, and its conversion from and to mappings."""

# Without `from __future__ import annotations`: the checks need annotations that are types, not strings.
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, Literal, Self, TypeVar, cast

import attrs
import torch
from cattrs import transform_error

from tunerkit.config.converter import CONVERTER, described, got, is_supported
from tunerkit.errors import ConfigError, closest, cut, shown

Config = TypeVar("Config", bound="AdapterConfig")
_NAMED: Final = 10  # unknown keys that an error lists
_COMPARE: Final = {
    "ge": (">=", operator.ge),
    "gt": (">", operator.gt),
    "le": ("<=", operator.le),
    "lt": ("<", operator.lt),
}


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
    """Define a config field: its default, its meaning and its range.

    The range applies to every number in the field, including each value of a tuple or mapping. ``None`` is exempt.
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

    Returns:
        An attrs field.
    """
    metadata = {"doc": doc, "ge": ge, "gt": gt, "le": le, "lt": lt, "converter": converter}
    return attrs.field(default=default, metadata=metadata)


def _dtype_name(value: object) -> object:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


@attrs.frozen(kw_only=True)
class AdapterConfig:
    """The settings that every method has. A method's config class derives from it and adds its own settings.

    The class is abstract. Derive from it with ``@attrs.frozen``; the new fields may be positional::

        @attrs.frozen
        class LoraConfig(AdapterConfig):
            rank: int = setting(8, ge=1, doc="The rank of every update.")

    Annotations may use ``bool``, ``int``, ``float``, ``str``, ``None``, ``Literal[...]``, ``tuple[...]``,
    ``Mapping[str, ...]`` and unions of these, so that every config can be written as JSON. Building a config checks
    all fields, converts lists to tuples and copies mappings. The ``doc`` of each field explains it.

    Raises:
        ConfigError: Some fields are invalid; the error lists every problem.
        TypeError: The derived class is not an attrs class, or one of its annotations is not supported.
    """

    targets: str | tuple[str, ...] | None = setting(
        None,
        doc="Which layers get an adapter: path suffixes, globs, 're:' patterns, or 'all-linear'; "
        "None takes the architecture's default.",
    )
    exclude: tuple[str, ...] = setting((), doc="Targets to leave out, and new modules to keep frozen.")
    layers: tuple[int, ...] | None = setting(None, doc="Numbers of the layers to adapt; None means all.")
    train_modules: tuple[str, ...] = setting((), doc="Modules trained in full, as copies; if empty, new heads are.")
    bias: Literal["none", "adapters", "all"] = setting(
        "none", doc="Which biases are trained, as copies: none, those of the adapted layers (adapters), or all."
    )
    adapter_dtype: Literal["float32", "float64", "bfloat16", "float16"] = setting(
        "float32", converter=_dtype_name, doc="The dtype of the adapter's weights: a name or a torch.dtype."
    )

    @property
    def total_steps(self) -> int | None:
        """The length of training in optimizer steps. A method may define such a setting."""
        return None

    @property
    def dropout(self) -> float:
        """The share of the adapter's input that is dropped in training. A method may define such a setting."""
        return 0.0

    @classmethod
    def __attrs_init_subclass__(cls) -> None:
        if cls.__attrs_post_init__ is not AdapterConfig.__attrs_post_init__:
            raise TypeError(f"{cls.__name__} overrides __attrs_post_init__, which checks it; override problems()")
        for field in attrs.fields(attrs.resolve_types(cls)):
            if not is_supported(field.type):
                raise TypeError(
                    f"{cls.__name__}.{field.name} is annotated {described(field.type)}, which a config cannot hold; "
                    "use bool, int, float, str, None, Literal, tuple[...], Mapping[str, ...] or a union of these"
                )

    def __attrs_pre_init__(self) -> None:
        if "__attrs_attrs__" not in type(self).__dict__:
            raise TypeError(f"{type(self).__name__} is not an attrs class: decorate it with @attrs.frozen")
        if type(self) is AdapterConfig:
            raise TypeError("AdapterConfig is abstract: build the config of a method, such as LoraConfig")

    def __attrs_post_init__(self) -> None:
        # The config is still being built, so this may normalise values: a list to a tuple, an int to a float.
        names = set(_settings(type(self)))
        own = attrs.asdict(self, recurse=False, filter=lambda field, _: field.name in names)
        values, problems = _read(_settings(type(self)), own)
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
        """Override this to check fields against each other. It is called once each field is valid by itself.

        Returns:
            One line per problem, which ends in the path: ``"expected init_rank <= 8, got 12 @ $.init_rank"``.
        """
        return ()

    def settled(self) -> Self:
        """Override this if some defaults depend on other settings.

        Files store the result, so that an adapter does not change if a later version computes other defaults.

        Returns:
            A config in which the resolved defaults are explicit.
        """
        return self


def from_mapping(cls: type[Config], mapping: object) -> Config:
    """Build the config that ``mapping`` (from JSON, YAML or a file's header) describes.

    Nothing is guessed. A string for a number or a list, a bool for an int, and an unknown or non-string key are errors.
    Raises `ConfigError` with every problem and its path.
    """
    fields = _settings(cls)
    if not isinstance(mapping, Mapping):
        raise ConfigError([f"expected a mapping of settings, {got(mapping)} @ $"])
    unknown = [key for key in mapping if key not in fields]
    problems = [_unknown(key, fields) for key in unknown[:_NAMED]]  # looking for the closest names takes time
    problems += [f"and {len(unknown) - _NAMED} more unknown keys @ $"] if len(unknown) > _NAMED else []
    required = [name for name, field in fields.items() if field.default is attrs.NOTHING]
    problems += [f"missing, and it has no default @ $.{name}" for name in required if name not in mapping]
    if problems:
        raise ConfigError([*problems, *_read(fields, mapping)[1]])
    return cls(**{str(fields[name].alias): value for name, value in mapping.items()})


# Any: a format's options are of a class of its plugin's.
def options_from(cls: Any, mapping: Mapping[str, object]) -> Any:
    """Build an object of any attrs class, checked as a config is. Raises `ConfigError` with every problem."""
    fields = {field.name: field for field in attrs.fields(attrs.resolve_types(cls)) if field.init}
    problems = [_unknown(key, fields) for key in mapping if key not in fields]
    required = [name for name, field in fields.items() if field.default is attrs.NOTHING]
    problems += [f"missing, and it has no default @ $.{name}" for name in required if name not in mapping]
    values, wrong = _read(fields, mapping)
    if problems := [*problems, *wrong]:
        raise ConfigError(problems)
    try:
        return cls(**{str(fields[name].alias): value for name, value in values.items()})
    except (ValueError, TypeError) as error:  # of a validator of attrs
        raise ConfigError([f"{error} @ $"]) from error


def unstructure(config: AdapterConfig) -> dict[str, Any]:
    """Convert a config to a mapping; `structure` reverses it.

    Args:
        config: Any method's config.

    Returns:
        All settings by name, as values that JSON and YAML can hold.
    """
    plain = CONVERTER.unstructure(config)
    return {name: plain[name] for name in _settings(type(config))}


def _settings(cls: object) -> dict[str, "attrs.Attribute[Any]"]:
    """Return the fields that a config is built from, by name. Raises `TypeError` if ``cls`` is no config class."""
    if not (isinstance(cls, type) and issubclass(cls, AdapterConfig)):
        raise TypeError(f"expected a config class derived from tunerkit.AdapterConfig, got {cls!r}")
    return {field.name: field for field in attrs.fields(cls) if field.init}


def _unknown(key: object, names: Iterable[str]) -> str:
    if not isinstance(key, str):
        return f"expected str keys, {got(key)} @ $"
    known = "; known keys: " + (", ".join(names) or "none")
    return f"unknown key {shown(key)}{closest(key, names) or known} @ $.{cut(key, 80)}"


def _read(
    fields: Mapping[str, "attrs.Attribute[Any]"], mapping: Mapping[str, Any]
) -> tuple[dict[str, object], list[str]]:
    """Return the valid settings of ``mapping`` as the fields store them, and the problems of the others."""
    values, problems = {}, []
    for name, field in fields.items():
        if name in mapping:
            convert = field.metadata.get("converter") or (lambda value: value)
            try:
                values[name] = CONVERTER.structure(convert(mapping[name]), cast(Any, field.type))
            except Exception as error:  # cattrs raises groups, a plugin's converter may raise anything
                problems += transform_error(error, f"$.{name}", lambda problem, _: str(problem))
            else:
                problems += _out_of_range(values[name], field.metadata, f"$.{name}")
    return values, problems


def _out_of_range(value: object, limits: Mapping[str, Any], path: str) -> Iterator[str]:
    if isinstance(value, (tuple, dict)):
        for key, element in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _out_of_range(element, limits, f"{path}[{shown(key)}]")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        for name, (sign, holds) in _COMPARE.items():
            limit = limits.get(name)
            if limit is not None and not holds(value, limit):
                yield f"expected {sign} {limit}, got {shown(value)} @ {path}"
