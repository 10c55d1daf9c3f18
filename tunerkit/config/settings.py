"""The base of every method's config, its strict checks, and its way from and to plain mappings."""

# No `from __future__ import annotations` here: the checks read the annotations as types.
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, Literal, Self, TypeVar, cast

import attrs
import torch
from cattrs import transform_error

from tunerkit.config.converter import CONVERTER, SHORT, described, got, is_supported
from tunerkit.errors import ConfigError, closest

Config = TypeVar("Config", bound="AdapterConfig")
_COMPARE: Final[Mapping[str, tuple[str, Callable[[float, float], bool]]]] = {
    "ge": (">=", lambda value, limit: value >= limit),
    "gt": (">", lambda value, limit: value > limit),
    "le": ("<=", lambda value, limit: value <= limit),
    "lt": ("<", lambda value, limit: value < limit),
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

    @property
    def total_steps(self) -> int | None:
        """The length of training in optimizer steps, for a method to have as a setting of this name."""
        return None

    @property
    def dropout(self) -> float:
        """The share of the adapter's input dropped in training, for a method to have as a setting of this name."""
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
        check(self)

    def target_patterns(self) -> Iterable[tuple[str, str]]:
        """(pattern, field) of every pattern that must match one of the chosen targets, for methods to override."""
        return ()

    def problems(self) -> Iterable[str]:
        """The problems across fields, for methods to override; asked only once each field is right by itself.

        Each is one line that ends in the path: ``"expected init_rank <= 8, got 12 @ $.init_rank"``.
        """
        return ()

    def settled(self) -> Self:
        """The same with what was left to defaults that depend on other settings written out, for methods to override.

        Files hold it, so that an adapter stays what it was when a later version chooses otherwise.
        """
        return self


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


def from_mapping(cls: type[Config], mapping: object) -> Config:
    """The config that ``mapping`` (from JSON, YAML or a file's header) describes.

    Nothing is guessed: no text for numbers or lists, no bool for int, no unknown or non-text keys.
    Raises `ConfigError` with every problem and its path.
    """
    _refuse_non_config(cls)
    if not isinstance(mapping, Mapping):
        raise ConfigError([f"expected a mapping of settings, {got(mapping)} @ $"])
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


def to_mapping(config: AdapterConfig) -> dict[str, Any]:
    """``config`` as plain dicts, lists, strings and numbers, with every setting: `structure` takes it back."""
    _refuse_non_config(type(config))
    return {field.name: CONVERTER.unstructure(getattr(config, field.name)) for field in _settings(type(config))}


def _settings(cls: type[AdapterConfig]) -> Iterator["attrs.Attribute[Any]"]:
    return (field for field in attrs.fields(cls) if field.init)


def _refuse_non_config(cls: object) -> None:
    if not (isinstance(cls, type) and issubclass(cls, AdapterConfig)):
        raise TypeError(f"expected a config class derived from tunerkit.AdapterConfig, got {cls!r}")


def _unknown(key: object, names: Iterable[str]) -> str:
    if not isinstance(key, str):
        return f"expected str keys, {got(key)} @ $"
    return f"unknown key {key!r}{closest(key, names) or '; known are ' + ', '.join(names)} @ $.{key}"


def _read(field: "attrs.Attribute[Any]", value: object) -> tuple[object, list[str]]:
    """``value`` as ``field`` stores it, and what is wrong with it."""
    path = f"$.{field.name}"
    convert = field.metadata.get("converter")
    try:
        read = CONVERTER.structure(value if convert is None else convert(value), cast(Any, field.type))
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
                yield f"expected {sign} {limit}, got {SHORT.repr(value)} @ {path}"
