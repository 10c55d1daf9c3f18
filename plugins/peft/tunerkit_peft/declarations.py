"""PEFT's names for methods, as these declare them, and who reads which type of PEFT's."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import attrs
from torch import Tensor

import tunerkit
from tunerkit.errors import closest, shown
from tunerkit.plugin import FileError, Method, PluginError, method_record

Made = TypeVar("Made")
Size = int | str
Convert = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
OUT, IN, KERNEL, ONES, CHANNELS = "out", "in", "*in", "1*", "channels"
FORMAT: Final = "peft"
NONE: Final = object()  # no default: None is one
# The fields of PEFT's configs that every type has, and that this plugin reads and writes itself.
COMMON: Final = frozenset(
    {
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "bias",
        "fan_in_fan_out",
        "ensure_weight_tying",
    }
)


def _wrong(what: str, got: object) -> ValueError:
    return ValueError(f"expected {what}, got {shown(got)}")


def _text(value: Any) -> str:
    if isinstance(value, str) and value:
        return value
    raise _wrong("a text", value)


def _texts(value: Any) -> tuple[str, ...]:
    """One text or several."""
    given = (value,) if isinstance(value, str) else value
    if isinstance(given, Sequence) and given and all(isinstance(each, str) and each for each in given):
        return tuple(given)
    raise _wrong("a text or several", value)


def _names(value: Any) -> tuple[str, ...]:
    return () if value in ((), []) else _texts(value)


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise _wrong("True or False", value)


def _shape(value: Any) -> tuple[Size, ...] | None:
    if value is None:
        return None
    if isinstance(value, list | tuple) and all(_is_size(size) for size in value):
        return tuple(value)
    raise _wrong('a list of sizes, such as ["out", "rank", 1]', value)


def _is_size(value: Any) -> bool:
    return bool(value) and (isinstance(value, str) or (type(value) is int and value > 0))


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping) and all(isinstance(key, str) and key for key in value):
        return dict(value)
    raise _wrong("a mapping from names", value)


def _text_or_none(value: Any) -> str:
    return "" if value == "" else _text(value)


def _fixed(value: Any) -> dict[str, tuple[Any, tuple[str, ...]]]:
    def pair(given: Any) -> tuple[Any, tuple[str, ...]]:
        if isinstance(given, list | tuple) and len(given) == 2:
            return given[0], _texts(given[1])
        raise _wrong("a value and the classes of layers", given)

    return _each(pair, value)


def _functions(value: Any) -> dict[str, Convert]:
    for name, each in (given := _mapping(value)).items():
        if not callable(each):
            raise ValueError(f"{name}: {_wrong('a function of the tensors of a target', each)}")
    return given


def _each(make: Callable[[Any], Made], value: Any) -> dict[str, Made]:
    """Convert the values of a mapping; an error says which."""
    found = {}
    for key, each in _mapping(value).items():
        try:
            found[key] = make(each)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
    return found


def _shapes(value: Any) -> dict[str, tuple[Size, ...] | None]:
    return _each(_shape, value)


@attrs.frozen(kw_only=True)
class Leaf:
    """PEFT's name and shape of one tensor. A bare text is the name alone.

    A shape has these sizes: ``"out"`` and ``"in"``, the layer's features; a text of your own, a size that the tensors
    of one target agree on, which must equal the setting of that name if there is one; a number, which is that size. A
    ``1`` is a dimension that tunerkit's tensor lacks. ``"1*"`` is such a dimension for each one of a convolution's
    kernel, and none elsewhere. ``"*in"`` is "in" as a convolution has it: the input channels, and the kernel.
    ``"channels"`` is "in" without the kernel, and of all groups.

    Attributes:
        name: The name below the module's path, without the adapter's name: ``"hada_w1_a"``, ``"oft_R.weight"``. If
            there are several, all are read, and the first one is written.
        shape: The shape; None for the shape that the tensor has here.
        convolution: The shape at a convolution, if it is another one.
        embedding: The name at an embedding, if it is another one.
        chosen: The shape at the targets that a setting names, by the setting; see `Setting.targets`.
        integers: The dtype of integers, such as ``"int32"``; they are int64 here. Empty for numbers.
        optional: Whether a target may lack it.
        repeated: Whether PEFT also writes a shared tensor at each target.
    """

    name: tuple[str, ...] = attrs.field(converter=_texts)
    shape: tuple[Size, ...] | None = attrs.field(default=None, converter=_shape)
    convolution: tuple[Size, ...] | None = attrs.field(default=None, converter=_shape)
    embedding: str = attrs.field(default="", converter=_text_or_none)
    chosen: Mapping[str, tuple[Size, ...] | None] = attrs.field(factory=dict, converter=_shapes)
    integers: str = attrs.field(default="", converter=_text_or_none)
    optional: bool = attrs.field(default=False, converter=_flag)
    repeated: bool = attrs.field(default=False, converter=_flag)

    @property
    def names(self) -> tuple[str, ...]:
        """All names that are read."""
        return (*self.name, *([self.embedding] if self.embedding else []))


def _values(value: Any) -> tuple[tuple[Any, tuple[Any, ...]], ...]:
    if not isinstance(value, Mapping):
        raise _wrong("a mapping from the values here to those of PEFT", value)
    return tuple((own, tuple(each) if isinstance(each, list | tuple) else (each,)) for own, each in value.items())


def _portable(value: Any) -> tuple[Any, str] | None:
    if value is None or (isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[1], str)):
        return None if value is None else (value[0], value[1])
    raise _wrong("a value and a sentence", value)


@attrs.frozen(kw_only=True)
class Setting:
    """PEFT's name of one setting of the method's config. A bare text is the name alone.

    Attributes:
        name: The field of PEFT's config. If there are several, all are written, and must agree when they are read.
        values: PEFT's value for each value here. Of several, all are read, and the first one is written. Empty if the
            values are the same.
        default: What PEFT takes where an older folder lacks the field. Without it, such a folder is refused.
        none: PEFT's value where the setting is None.
        instead_of: Another setting: PEFT uses that one or this one, and has 0 for the other. Here that is None.
        measured: Whether the tensors say it by a size of this name, whatever PEFT's field says.
        portable: The value that every PEFT reads, and a sentence on the others, which is a warning when one is written.
        pattern: PEFT's field that maps patterns to other values at some targets. Here that is the setting with
            ``_pattern`` after this one's name.
        targets: Whether the setting names some of the targets, by patterns here and by ends of their paths in PEFT.
    """

    name: tuple[str, ...] = attrs.field(converter=_texts)
    values: tuple[tuple[Any, tuple[Any, ...]], ...] = attrs.field(default={}, converter=_values)
    default: Any = NONE
    none: Any = NONE
    instead_of: str = attrs.field(default="", converter=_text_or_none)
    measured: bool = attrs.field(default=False, converter=_flag)
    portable: tuple[Any, str] | None = attrs.field(default=None, converter=_portable)
    pattern: str = attrs.field(default="", converter=_text_or_none)
    targets: bool = attrs.field(default=False, converter=_flag)

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields of PEFT's config that it is read from."""
        return (*self.name, *([self.pattern] if self.pattern else []))


def _leaves(value: Any) -> dict[str, Leaf]:
    return _each(lambda each: _built(Leaf, _named(each)), value)


def _settings(value: Any) -> dict[str, Setting]:
    return _each(lambda each: _built(Setting, _named(each)), value)


def _named(value: Any) -> dict[str, Any]:
    """A mapping, or the name alone, as most need no more."""
    return {"name": value} if isinstance(value, str | list | tuple) else _mapping(value)


def _built(cls: Any, given: Mapping[str, Any]) -> Any:
    """Build one of the classes here. Raises `ValueError`, which says what is wrong in which attribute."""
    fields = attrs.fields(cls)
    known = [field.name for field in fields]
    for key in given:
        if key not in known:
            raise ValueError(f"{shown(key)} is none of {', '.join(known)}{closest(key, known)}")
    required = [field.name for field in fields if field.default is attrs.NOTHING]
    for name in required:
        if name not in given:
            raise ValueError(f"{name!r} is missing")
    for field in fields:
        if field.name in given and field.converter is not None:
            try:
                field.converter(given[field.name])  # once here, so that the error says which
            except ValueError as error:
                raise ValueError(f"{field.name}: {error}") from error
    return cls(**given)


@attrs.frozen(kw_only=True)
class Declaration:
    """What ``Method.foreign["peft"]`` may hold: PEFT's names for one method.

    A whole one, of LoHa::

        foreign={
            "peft": {
                "type": "LOHA",
                "tensors": {"b1": "hada_w1_a", "a1": "hada_w1_b", "b2": "hada_w2_a", "a2": "hada_w2_b"},
                "settings": {"rank": "r", "alpha": "alpha"},
                "constants": {"use_effective_conv2d": False},
                "training": {"rank_dropout": 0.0, "module_dropout": 0.0},
                "ignored": ["init_weights"],
                "layers": ["Linear", "Conv1d", "Conv2d"],
            }
        }

    Attributes:
        type: PEFT's ``peft_type``.
        tensors: PEFT's name of each tensor of the method's adapter, by its name here: see `Leaf`. All that the adapter
            saves must be named.
        shared: The same for the tensors of the shared module. PEFT keeps them under ``base_model.``. A ``*`` at the end
            of both names stands for the rest of a name, as in ``{"v.*": "tinylora_v.*"}``.
        settings: PEFT's name of each setting of the method's config: see `Setting`.
        others: Functions that turn the tensors of a target in another form of PEFT's, by PEFT's names, into those of
            the declared form, which is written. Each is used where a file has the tensor that it is named by.
        fixed: Settings of the method that PEFT has no field for, each with the value that a folder of PEFT's has, and
            with the classes of the layers where it matters: an adapter with another value there is not written.
        constants: Fields of PEFT's config that change what is computed, with the only value that the method computes,
            or a tuple of values that mean the same. A folder with another one is refused, and the first is written.
        drawn: Constants that say how optional shared tensors are drawn where a file lacks them. In others, any value is
            right.
        training: Fields that only change training, with the value that the method trains with. A folder with another
            one is read, with a warning, and this one is written.
        ignored: Fields of any value that say how the adapter began, or that its tensors say too.
        layers: The classes of the modules that PEFT adapts by this type; ``"Module"`` is any.
        bias: The value of PEFT's ``bias`` with which the biases of the targets are trained, such as ``"vera_only"``;
            empty if this type of PEFT's trains none.
        tied: The setting that is True where the targets share one weight, and the shared module has all tensors. PEFT
            then adapts every module that is tied to the input's embedding, and saves the same tensors at each.
    """

    type: str = attrs.field(converter=_text)
    tensors: Mapping[str, Leaf] = attrs.field(converter=_leaves)
    shared: Mapping[str, Leaf] = attrs.field(factory=dict, converter=_leaves)
    settings: Mapping[str, Setting] = attrs.field(factory=dict, converter=_settings)
    others: Mapping[str, Convert] = attrs.field(factory=dict, converter=_functions)
    fixed: Mapping[str, tuple[Any, tuple[str, ...]]] = attrs.field(factory=dict, converter=_fixed)
    constants: Mapping[str, Any] = attrs.field(factory=dict, converter=_mapping)
    drawn: Mapping[str, Any] = attrs.field(factory=dict, converter=_mapping)
    training: Mapping[str, Any] = attrs.field(factory=dict, converter=_mapping)
    ignored: tuple[str, ...] = attrs.field(default=(), converter=_names)
    layers: tuple[str, ...] = attrs.field(default=("Linear", "Conv1D"), converter=_texts)
    bias: str = attrs.field(default="", converter=_text_or_none)
    tied: str = attrs.field(default="", converter=_text_or_none)

    def takes(self, module: object) -> bool:
        """Whether PEFT adapts a module of this class."""
        return any(kind.__name__ in self.layers for kind in type(module).__mro__)


@attrs.frozen
class Declared:
    """A method with its declaration.

    Attributes:
        method: The method's name.
        config: Its config class.
        names: The declaration.
    """

    method: str
    config: type
    names: Declaration


def declared_by(method: str) -> Declared | None:
    """Return a method's declaration; None if it has none.

    Raises:
        PluginError: The declaration is wrong; the error names the plugin, the method and the place.
        UnknownMethodError: There is no such method.
    """
    record = method_record(method)
    given = record.foreign.get(FORMAT)
    if given is None:
        return None
    try:
        if not isinstance(given, Mapping):
            raise _wrong("a mapping", given)
        names = _built(Declaration, given)
        for problem in _contradictions(record, names):
            raise ValueError(problem)
    except (ValueError, TypeError) as error:
        raise PluginError(
            f"the plugin of method {method!r} ({tunerkit.methods()[method].distribution}) declares foreign"
            f"[{FORMAT!r}] wrongly: {error}. tunerkit_peft.declarations.Declaration says what it may hold"
        ) from error
    return Declared(method, record.config, names)


def declarations() -> Iterator[tuple[str, str]]:
    """Yield each installed method that declares a type of PEFT's, with that type."""
    for method, info in tunerkit.methods().items():
        if info.error is not None:
            continue
        given: Any = method_record(method).foreign.get(FORMAT)
        if isinstance(given, Mapping) and isinstance(given.get("type"), str):
            yield method, given["type"]


def _contradictions(record: Method, names: Declaration) -> Iterator[str]:
    fields = [field.name for field in attrs.fields(record.config)]
    taken: dict[str, str] = {name: "what every type has" for name in COMMON}
    for setting in (*names.settings, *names.fixed, *([names.tied] if names.tied else [])):
        if setting not in fields:
            yield f"settings: {record.config.__name__} has no setting {setting!r}{closest(setting, fields)}"
    for own, each in names.settings.items():
        for given in (*([f"{own}_pattern"] if each.pattern else []), *([each.instead_of] if each.instead_of else [])):
            if given not in fields:
                yield f"settings.{own}: {record.config.__name__} has no setting {given!r}{closest(given, fields)}"
    groups: dict[str, Collection[str]] = {
        **{f"settings.{own}": each.fields for own, each in names.settings.items()},
        **{"constants": names.constants, "drawn": names.drawn, "training": names.training, "ignored": names.ignored},
    }
    for group, used in groups.items():
        for name in used:
            if name in taken:
                yield f"{group}: {name!r} belongs to {taken[name]} already"
            taken[name] = group
    for group, leaves in (("tensors", names.tensors), ("shared", names.shared)):
        known: dict[str, str] = {}
        for own, leaf in leaves.items():
            for name in leaf.names:
                if name in known:
                    yield f"{group}: {own!r} and {known[name]!r} are both {name!r}"
                known[name] = own
                if name.endswith("*") != own.endswith("*") or (group == "tensors" and "*" in name):
                    yield f"{group}: {own!r} and {name!r}: a '*' ends both names, of shared tensors only"
            for setting in leaf.chosen:
                if setting not in names.settings or not names.settings[setting].targets:
                    yield f"{group}: {own!r} is chosen by {setting!r}, which is no setting with targets=True"


_OWN: Final = ("LORA", "ADALORA")
# The types that methods of tunerkit-methods read.
IN_METHODS: Final = (
    *("LOHA", "LOKR", "VERA", "IA3", "OFT", "BOFT", "HRA", "RANDLORA", "VBLORA", "FOURIERFT", "C3A", "MISS", "ROAD"),
    *("SHIRA", "DELORA", "TINYLORA", "LN_TUNING", "TRAINABLE_TOKENS"),
)
# The types of peft 0.21 that no method reads.
_OF_PEFT: Final = (
    *("ADAMSS", "BEFT", "LILY", "FROD", "PVERA", "GLORA", "UNILORA", "HIRA", "WAVEFT", "OSF", "GRALORA", "PSOFT"),
    *("PEANUT", "SUPERTUNING", "DEFT", "POLY", "XLORA"),
)
# Those that change no weight, so that they cannot be merged.
_PROMPTS: Final = (
    *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE"),
    "SHADOW",
)
BRINGS: Final = "tunerkit-methods brings one: install tunerkit[methods]"


def declared_for(found: Mapping[str, Any], source: str | Path) -> Declared | None:
    """Return the method whose names the settings of a PEFT adapter need; None for a LoRA or an AdaLoRA.

    A LoRA belongs to another method if that declares ``use_dora`` to be true, and so do the settings.

    Args:
        found: The settings by name.
        source: What an error is about.

    Raises:
        FileError: No installed method declares this type.
        PluginError: The declaration is wrong.
    """
    kind, declared = found.get("peft_type"), installed_for(found)
    if declared is None and kind not in _OWN:
        raise FileError(_unknown(source, kind))
    return declared


def installed_for(found: Mapping[str, Any]) -> Declared | None:
    """Return the method whose names the settings need; None for a LoRA or an AdaLoRA, or if none is installed.

    Of several methods for one type, it is the one that computes what the settings say.
    """
    kind = found.get("peft_type")
    if kind == "ADALORA" or (kind == "LORA" and not found.get("use_dora")):
        return None
    candidates = [each for method, given in declarations() if given == kind and (each := declared_by(method))]
    if kind == "LORA":
        candidates = [each for each in candidates if each.names.constants.get("use_dora")]
    return min(
        candidates,
        key=lambda each: sum(found.get(name) != value for name, value in each.names.constants.items()),
        default=None,
    )


def _unknown(source: str | Path, kind: object) -> str:
    if kind is None:
        return f"{source} is no PEFT adapter: it has no 'peft_type'; expected 'LORA' or 'ADALORA'"
    known = sorted({given for _, given in declarations()} - {*_OWN})
    if kind in IN_METHODS:
        return f"{source}: 'peft_type' is {shown(kind)}, and no installed method reads it. {BRINGS}"
    reads = f"tunerkit reads LORA and ADALORA{', and by installed methods ' + ', '.join(known) if known else ''}"
    if kind in _PROMPTS:
        return (
            f"{source}: 'peft_type' is {shown(kind)}, which adds no weights to layers, and tunerkit has adapters of "
            f"layers alone. Use this adapter in PEFT, or train another type; {reads}"
        )
    hint = "" if kind in _OF_PEFT else closest(str(kind), (*_OWN, *known, *IN_METHODS))
    return (
        f"{source}: 'peft_type' is {shown(kind)}, a type that tunerkit does not read{hint or '.'} Merge the adapter in "
        f"PEFT (merge_and_unload), if that type can be merged, and use the merged model as the base; {reads}"
    )
