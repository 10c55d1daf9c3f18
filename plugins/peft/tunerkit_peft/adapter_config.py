"""The settings of a PEFT adapter, read from ``adapter_config.json`` and checked."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs

from tunerkit.errors import first, shown
from tunerkit.plugin import FileError
from tunerkit_peft import fields
from tunerkit_peft.base_starts import STARTS
from tunerkit_peft.selection import Selection, selection_of
from tunerkit_peft.values import HIGHEST_RANK, Values, is_number, is_rank

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
        start: The start of a LoRA that is subtracted from the base, one of `base_starts.STARTS`; else empty.
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
        return [*fields.problems(held), *(changed_base(found) if found.get("init_lora_weights") not in STARTS else ())]
    # PEFT's AdaLoRA starts in one way, so what the settings say of a start has no effect.
    return [*fields.problems({name: value for name, value in found.items() if name not in _NOT_IN_ADALORA})]


def changed_base(found: Mapping[str, object]) -> Iterator[str]:
    """Yield what is wrong with the start of a LoRA: some change the base weights."""
    start = found.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith("pissa_niter_"):
        yield f"'init_lora_weights' is {shown(start)}: {fields.RANDOM_START}"
    elif not (start is None or isinstance(start, bool) or start in fields.PLAIN_STARTS):
        yield f"'init_lora_weights' is {shown(start)}: {fields.CHANGED_BASE}"
