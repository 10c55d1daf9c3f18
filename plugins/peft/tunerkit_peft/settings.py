"""The settings of a PEFT LoRA or AdaLoRA, read from ``adapter_config.json`` and checked (peft 0.21)."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import attrs

from tunerkit.errors import closest, first, shown
from tunerkit.plugin import FileError
from tunerkit_peft.targets import Selection, selection_of

Value = TypeVar("Value")
HIGHEST_RANK: Final = 1_000_000
_HIGHEST: Final = 10**12
_LARGEST: Final = 1e12  # of the numbers that multiply weights: products stay in the range of fp32


def is_rank(value: object) -> bool:
    """Whether a value is a rank that PEFT's LoRA may have."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= HIGHEST_RANK


def is_number(value: object) -> bool:
    """Whether a value is a number that can multiply weights."""
    # False for NaN as well.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


@attrs.define
class Values:
    """The values of a JSON object.

    Attributes:
        found: The object.
        problems: What is wrong with the values that were read, one line each.
    """

    found: Mapping[str, Any]
    problems: list[str] = attrs.field(factory=list)

    def integer(self, name: str, default: int, *, least: int = 0, most: int = _HIGHEST) -> int:
        """Read an integer. An absent value or null is the default, here and below."""
        value = self._given(name, default)
        if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
            return value
        return self._wrong(name, value, f"an integer from {least} to {most}", default)

    def number(self, name: str, default: float, *, least: float = -math.inf, below: float = math.inf) -> float:
        """Read a number."""
        value = self._given(name, default)
        if is_number(value) and least <= value < below:
            return float(value)
        limits = (f" from {least:g}" if least > -math.inf else "") + (
            f" and below {below:g}" if below < math.inf else ""
        )
        return self._wrong(name, value, f"a number{limits}, at most {_LARGEST:g}", default)

    def flag(self, name: str) -> bool:
        """Read true or false."""
        value = self._given(name, False)
        return value if isinstance(value, bool) else self._wrong(name, value, "true or false", False)

    def text(self, name: str) -> str:
        """Read a text."""
        value = self._given(name, "")
        return value if isinstance(value, str) else self._wrong(name, value, "a text", "")

    def choice(self, name: str, allowed: tuple[str, ...]) -> str:
        """Read one of some words."""
        value = self._given(name, allowed[0])
        if isinstance(value, str) and value in allowed:
            return value
        return self._wrong(name, value, " or ".join(map(repr, allowed)), allowed[0])

    def names(self, name: str) -> tuple[str, ...]:
        """Read a list of names."""
        value = self._given(name, [])
        if isinstance(value, list) and all(isinstance(each, str) and each for each in value):
            return tuple(value)
        return self._wrong(name, value, "a list of names", ())

    def places(self, name: str) -> bool:
        """Whether a value is a list of names of modules, or an expression for their paths."""
        value = self._given(name, [])
        if isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value)):
            return True
        return self._wrong(name, value, "a list of names, or a regular expression", False)

    def table(self, name: str, is_valid: Callable[[object], bool], expected: str) -> dict[str, Any]:
        """Read numbers by name."""
        value = self._given(name, {})
        if not isinstance(value, dict):
            return self._wrong(name, value, "an object that maps patterns to numbers", {})
        wrong = {key: each for key, each in value.items() if not is_valid(each)}
        for key, each in wrong.items():
            self._wrong(f"{name}.{key}", each, expected, None)
        return {key: each for key, each in value.items() if key not in wrong}

    def ids(self, name: str) -> dict[str, tuple[int, ...]]:
        """Read ids by the name of a module; those of no module have an empty name."""
        value = self._given(name, {})
        table = {"": value} if isinstance(value, list) else value
        if not isinstance(table, dict) or not all(map(_are_ids, table.values())):
            return self._wrong(name, value, "a list of ids, or an object that maps names of modules to such lists", {})
        return {key: tuple(each) for key, each in table.items() if each}

    def masks(self, name: str) -> dict[str, int] | None:
        """Read how many values are true, by name; None for null."""
        value = self._given(name, None)
        if value is None:
            return None
        if not isinstance(value, dict):
            return self._wrong(name, value, "null, or an object that maps names to lists of true and false", None)
        wrong = [key for key, mask in value.items() if not _is_mask(mask)]
        for key in wrong:
            self._wrong(f"{name}.{key}", value[key], "a list of true and false, one for each triplet", None)
        return {key: sum(map(bool, mask)) for key, mask in value.items() if key not in wrong}

    def _given(self, name: str, default: Any) -> Any:
        value = self.found.get(name)
        return default if value is None else value

    def _wrong(self, name: str, value: object, expected: str, instead: Value) -> Value:
        self.problems.append(f"{name!r} is {shown(value)}; expected {expected}")
        return instead


def _are_ids(ids: object) -> bool:
    return isinstance(ids, list) and all(type(each) is int and 0 <= each <= _HIGHEST for each in ids)


def _is_mask(mask: object) -> bool:
    return isinstance(mask, list) and all(isinstance(each, bool) or each in (0, 1) for each in mask)


# Read by `settings`.
READ: Final = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "bias",
        "modules_to_save",
        "base_model_name_or_path",
        "init_lora_weights",
        "ensure_weight_tying",
        "init_r",
        "target_r",
        "tinit",
        "tfinal",
        "deltaT",
        "beta1",
        "beta2",
        "orth_reg_weight",
        "total_step",
    }
)

# They say how the adapter was made or where it was put. The tensors say that too, by their names and shapes, so
# nothing depends on them. Of the last four, Unsloth writes the first, and ms-swift the others, of its
# own optimizer and dtype.
HARMLESS: Final = frozenset(
    {
        "task_type",
        "auto_mapping",
        "peft_version",
        "revision",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "fan_in_fan_out",
        "layers_to_transform",
        "layers_pattern",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "velora_config",
        "qalora_group_size",
        "runtime_config",
        "unsloth_fixed",
        "lora_dtype",
        "lorap_lr_ratio",
        "lorap_emb_lr",
    }
)

_MERGE: Final = "merge it in PEFT (merge_and_unload) and use the merged model as the base"
_RETRAIN: Final = "train a plain LoRA instead"
# The field, what it makes of the adapter, and what to do.
REFUSED: Final[Mapping[str, tuple[str, str]]] = {
    "use_dora": (
        "DoRA, which also scales the base weight",
        f"{_MERGE}, or install tunerkit[methods], whose method 'dora' is this one",
    ),
    "lora_bias": ("a bias in lora_B, which is no product of two matrices", _MERGE),
    "trainable_token_indices": ("single trained rows of an embedding", f"{_MERGE}, or train the embedding in full"),
    "layer_replication": ("a base model with repeated layers", f"{_MERGE}, or build that base model first"),
    "target_parameters": (
        "adapters of parameters such as experts, which PEFT's LoRA alone has",
        f"{_MERGE}, or leave it out",
    ),
    "alora_invocation_tokens": ("an activated LoRA, which works from certain tokens on", _RETRAIN),
    "use_qalora": ("QA-LoRA, which averages groups of the input", _RETRAIN),
    "use_bdlora": ("BD-LoRA, whose matrices are block-diagonal", _MERGE),
    "arrow_config": ("Arrow, which routes between several adapters", "load each of its adapters by itself"),
    "kasa_config": ("KaSA, which changes the base weight at the start", _MERGE),
    "monteclora_config": ("MonteCLoRA, which draws random weights in training", _MERGE),
    "megatron_config": ("an adapter of Megatron's parallel layers", _RETRAIN),
}

# Starts of A and B that leave the base weight as it is: the files say all. The other ones change it.
PLAIN_STARTS: Final = ("gaussian", "eva", "orthogonal", "mica")  # and true, false, null
CHANGED_BASE: Final = (
    "a start that changes the base weights, which are not in the files. Convert it in PEFT: save it with "
    "save_pretrained(folder, path_initial_model_for_weight_conversion=...), or use the changed model as the base"
)
RANDOM_START: Final = (
    "a start that changes the base weights by a random decomposition, which cannot be repeated: PEFT rebuilds another. "
    "Where it was trained, save it with save_pretrained(folder, path_initial_model_for_weight_conversion=...), or use "
    "the changed model as the base"
)


def refused_fields(found: Mapping[str, object]) -> Iterator[str]:
    """Yield what the settings ask for that an adapter of tunerkit cannot do, each with what to do instead.

    Args:
        found: The settings by name, as the file has them.
    """
    for name, value in found.items():
        if name in READ or name in HARMLESS or not value:
            continue
        if name in REFUSED:
            what, instead = REFUSED[name]
            yield f"{name!r} is {shown(value)}: {what}. tunerkit cannot hold that; {instead}"
        else:
            hint = closest(name, READ | HARMLESS | REFUSED.keys())
            yield (
                f"{name!r} is {shown(value)}, a setting that PEFT 0.21 does not have{hint}. It may change what the "
                "adapter computes, so it is not ignored; delete it from the file if it does not"
            )


STARTS: Final = ("pissa", "olora")
_LARGEST_FILE: Final = 64_000_000  # bytes
_OF_LORA: Final = ("trainable_token_indices", "target_parameters")  # read for no other type
_NOT_IN_ADALORA: Final = ("alpha_pattern", "use_rslora", "use_dora")


@attrs.frozen
class Schedule:
    """How PEFT's AdaLoRA prunes, in its own words."""

    target_r: int
    tinit: int
    tfinal: int
    delta_t: int
    beta1: float
    beta2: float
    orth_reg_weight: float
    total_step: int


@attrs.frozen
class Common:
    """What the settings of every PEFT adapter say of where it is.

    Attributes:
        file: The file.
        kind: The type of adapter, ``peft_type``.
        bias: Which biases are trained: ``"none"``, ``"all"``, or those of the targets by a word of the type.
        copies: ``modules_to_save``: ends of the names of modules that are trained in full.
        tied: Whether the two sides of a tied weight are adapted as one.
        base: The name or path of the base model; may be empty.
        selection: Where the adapter is.
    """

    file: Path
    kind: str
    bias: str
    copies: tuple[str, ...]
    tied: bool
    base: str
    selection: Selection


@attrs.frozen
class Settings:
    """What the settings of a LoRA or AdaLoRA say of its function and of its training.

    Attributes:
        common: What every adapter has.
        rank: The rank at the targets that no pattern names: ``r``, or ``init_r`` for AdaLoRA.
        alpha: The numerator of the scale at the targets that no pattern names.
        dropout: The share of the input that is dropped while training.
        rslora: Whether alpha is divided by the root of the rank.
        ranks: ``rank_pattern`` of LoRA: the rank by pattern.
        alphas: ``alpha_pattern``.
        live: ``rank_pattern`` of AdaLoRA: how many triplets are live, by the name of their λ; None without one.
        schedule: AdaLoRA's schedule.
        start: The start of a LoRA that is subtracted from the base, one of `STARTS`; else empty.
        tokens: ``trainable_token_indices`` of a LoRA: ids by the end of a module's path.
        parameters: ``target_parameters`` of a LoRA: ends of the paths of parameters.
        version: The release of PEFT that saved it; may be empty.
        remarks: What the settings say and the adapter will not hold.
    """

    common: Common
    rank: int
    alpha: float
    dropout: float
    rslora: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    live: Mapping[str, int] | None
    schedule: Schedule
    start: str
    tokens: Mapping[str, tuple[int, ...]]
    parameters: tuple[str, ...]
    version: str
    remarks: tuple[str, ...]


def read_settings(file: Path, found: Mapping[str, Any]) -> Settings:
    """Check the settings of a LoRA or AdaLoRA, which `settings_at` has read.

    Raises:
        FileError: A value is of a wrong type or out of range, or the settings ask for something that tunerkit cannot
            hold. The error names every problem.
    """
    kind = found["peft_type"]
    reader = Values(found)
    settings = _lora(file, reader) if kind == "LORA" else _adalora(file, reader)
    refuse(file, [*reader.problems, *_unsupported(found, kind)])
    return settings


def refuse(file: Path, problems: Sequence[str]) -> None:
    """Raise `FileError` with all problems of the settings, if there are any."""
    if problems:
        raise FileError("\n- ".join([f"{file} cannot be used:", *first(problems)]))


def settings_at(file: Path) -> dict[str, Any]:
    """Read the settings.

    Raises:
        FileError: The file is no JSON object.
    """
    try:
        if file.stat().st_size > _LARGEST_FILE:
            raise FileError(f"{file} is larger than {_LARGEST_FILE // 1_000_000} MB, so it is no file of settings")
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileError:
        raise
    except RecursionError as error:
        raise FileError(
            f"{file} cannot be read as JSON: it is nested too deeply. Copy it again from where the adapter was saved"
        ) from error
    except (OSError, ValueError) as error:
        raise FileError(
            f"{file} cannot be read as JSON: {error}. Copy it again from where the adapter was saved"
        ) from error
    if not isinstance(found, dict):
        raise FileError(f"{file} is no PEFT adapter: expected a JSON object with settings, got {shown(found)}")
    return found


def _lora(file: Path, reader: Values) -> Settings:
    return Settings(
        rank=reader.integer("r", 8, least=1, most=HIGHEST_RANK),
        rslora=reader.flag("use_rslora"),
        ranks=reader.table("rank_pattern", is_rank, f"an integer from 1 to {HIGHEST_RANK}"),
        alphas=reader.table("alpha_pattern", is_number, "a number"),
        live=None,
        start=start if (start := reader.found.get("init_lora_weights")) in STARTS else "",
        tokens=reader.ids("trainable_token_indices"),
        parameters=reader.names("target_parameters"),
        remarks=tuple(_training(reader.found)),
        **_common(file, reader),
    )


def _adalora(file: Path, reader: Values) -> Settings:
    ignored = [name for name in _NOT_IN_ADALORA if reader.found.get(name)]
    return Settings(
        rank=reader.integer("init_r", 12, least=1, most=HIGHEST_RANK),
        rslora=False,
        ranks={},
        alphas={},
        live=reader.masks("rank_pattern"),
        start="",
        tokens={},
        parameters=(),
        remarks=tuple(f"{name!r} is set, and PEFT's AdaLoRA ignores it, so tunerkit does too" for name in ignored),
        **_common(file, reader),
    )


def _common(file: Path, reader: Values) -> dict[str, Any]:
    return {
        "common": common_of(file, reader, "lora_only"),
        "version": reader.text("peft_version"),
        "alpha": reader.number("lora_alpha", 8.0),
        "dropout": reader.number("lora_dropout", 0.0, least=0.0, below=1.0),
        "schedule": Schedule(
            target_r=reader.integer("target_r", 8, least=1, most=HIGHEST_RANK),
            tinit=reader.integer("tinit", 0),
            tfinal=reader.integer("tfinal", 0),
            delta_t=reader.integer("deltaT", 1, least=1),
            beta1=reader.number("beta1", 0.85, least=0.0, below=1.0),
            beta2=reader.number("beta2", 0.85, least=0.0, below=1.0),
            orth_reg_weight=reader.number("orth_reg_weight", 0.5, least=0.0),
            total_step=reader.integer("total_step", 0),
        ),
    }


def common_of(file: Path, reader: Values, bias: str) -> Common:
    """Read what the settings of every type have.

    Args:
        file: The file.
        reader: Its values.
        bias: The value of ``bias`` with which the type trains the biases of the targets; may be empty.
    """
    return Common(
        file=file,
        kind=str(reader.found.get("peft_type")),
        bias=reader.choice("bias", ("none", "all", bias) if bias else ("none",)),
        copies=reader.names("modules_to_save"),
        tied=reader.flag("ensure_weight_tying"),
        base=reader.text("base_model_name_or_path"),
        selection=selection_of(reader.found),
    )


def _training(found: Mapping[str, object]) -> Iterator[str]:
    """Yield how PEFT would train on in another way."""
    if found.get("velora_config"):
        yield "it was trained with VeLoRA, which approximates gradients; training goes on with exact ones"
    if found.get("init_lora_weights") == "mica":
        yield (
            "it was trained with MiCA, which trains A alone, and further training here trains B too, twice as many "
            "parameters; to keep B as it is, write: for each in tunerkit.tuner(model).adapters().values(): "
            "each.b.requires_grad_(False)"
        )
    if found.get("trainable_token_indices"):
        yield (
            "the rows of its trainable_token_indices are a product here, which computes the same, and further training "
            "would change other rows too; method 'trainable-tokens' trains such rows alone"
        )


def _unsupported(found: Mapping[str, object], kind: object) -> list[str]:
    if kind == "LORA":
        held = {name: value for name, value in found.items() if name not in _OF_LORA}
        return [*refused_fields(held), *(changed_base(found) if found.get("init_lora_weights") not in STARTS else ())]
    # PEFT's AdaLoRA starts in one way, so what the settings say of a start has no effect.
    return [*refused_fields({name: value for name, value in found.items() if name not in _NOT_IN_ADALORA})]


def changed_base(found: Mapping[str, object]) -> Iterator[str]:
    """Yield what is wrong with the start of a LoRA: some change the base weights."""
    start = found.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith("pissa_niter_"):
        yield f"'init_lora_weights' is {shown(start)}: {RANDOM_START}"
    elif not (start is None or isinstance(start, bool) or start in PLAIN_STARTS):
        yield f"'init_lora_weights' is {shown(start)}: {CHANGED_BASE}"
