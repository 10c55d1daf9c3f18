"""The settings of a PEFT adapter, read from ``adapter_config.json`` and checked."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import attrs

from tunerkit.errors import closest, first, shown
from tunerkit.plugin import FileError
from tunerkit_peft import fields
from tunerkit_peft.selection import Selection, selection_of
from tunerkit_peft.values import HIGHEST_RANK, Values, is_number, is_rank

_LARGEST_FILE: Final = 64_000_000  # bytes
_KINDS: Final = ("LORA", "ADALORA")


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
class Settings:
    """What the settings of a PEFT adapter say of its function and of its training.

    Attributes:
        file: The file.
        kind: The method.
        rank: The rank at the targets that no pattern names: ``r``, or ``init_r`` for AdaLoRA.
        alpha: The numerator of the scale at the targets that no pattern names.
        dropout: The share of the input that is dropped while training.
        rslora: Whether alpha is divided by the root of the rank.
        ranks: ``rank_pattern`` of LoRA: the rank by pattern.
        alphas: ``alpha_pattern``.
        live: ``rank_pattern`` of AdaLoRA: how many triplets are live, by the name of their λ; None without one.
        bias: Which biases are trained.
        copies: ``modules_to_save``: ends of the names of modules that are trained in full.
        tied: Whether the two sides of a tied weight are adapted as one.
        base: The name or path of the base model; may be empty.
        selection: Where the adapter is.
        schedule: AdaLoRA's schedule.
        remarks: What the settings say and the adapter will not hold.
    """

    file: Path
    kind: Literal["LORA", "ADALORA"]
    rank: int
    alpha: float
    dropout: float
    rslora: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    live: Mapping[str, int] | None
    bias: Literal["none", "all", "lora_only"]
    copies: tuple[str, ...]
    tied: bool
    base: str
    selection: Selection
    schedule: Schedule
    remarks: tuple[str, ...]


def read_settings(file: Path) -> Settings:
    """Read and check the settings.

    Raises:
        FileError: The file is no JSON object, a value is of a wrong type or out of range, or the settings ask for
            something that tunerkit cannot hold. The error names every problem.
    """
    found = _json(file)
    kind = found.get("peft_type")
    if kind not in _KINDS:
        raise FileError(_wrong_kind(file, kind))
    reader = Values(found)
    settings = _lora(file, reader) if kind == "LORA" else _adalora(file, reader)
    if wrong := [*reader.problems, *_unsupported(found, kind)]:
        raise FileError("\n- ".join([f"{file} cannot be used:", *first(wrong)]))
    return settings


def _json(file: Path) -> dict[str, Any]:
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


def _wrong_kind(file: Path, kind: object) -> str:
    if kind is None:
        return f"{file} is no PEFT adapter: it has no 'peft_type'; expected 'LORA' or 'ADALORA'"
    hint = closest(str(kind), _KINDS)
    return (
        f"{file}: 'peft_type' is {shown(kind)}, and tunerkit reads LORA and ADALORA{hint}. Merge the adapter in PEFT "
        "(merge_and_unload), if that method can be merged, and use the merged model as the base"
    )


def _lora(file: Path, reader: Values) -> Settings:
    return Settings(
        kind="LORA",
        rank=reader.integer("r", 8, least=1, most=HIGHEST_RANK),
        rslora=reader.flag("use_rslora"),
        ranks=reader.table("rank_pattern", is_rank, f"an integer from 1 to {HIGHEST_RANK}"),
        alphas=reader.table("alpha_pattern", is_number, "a number"),
        live=None,
        remarks=_velora(reader),
        **_common(file, reader),
    )


def _adalora(file: Path, reader: Values) -> Settings:
    ignored = [name for name in ("alpha_pattern", "use_rslora") if reader.found.get(name)]
    return Settings(
        kind="ADALORA",
        rank=reader.integer("init_r", 12, least=1, most=HIGHEST_RANK),
        rslora=False,
        ranks={},
        alphas={},
        live=reader.masks("rank_pattern"),
        remarks=tuple(f"{name!r} is set, and PEFT's AdaLoRA ignores it, so tunerkit does too" for name in ignored),
        **_common(file, reader),
    )


def _common(file: Path, reader: Values) -> dict[str, Any]:
    return {
        "file": file,
        "alpha": reader.number("lora_alpha", 8.0),
        "dropout": reader.number("lora_dropout", 0.0, least=0.0, below=1.0),
        "bias": reader.choice("bias", ("none", "all", "lora_only")),
        "copies": reader.names("modules_to_save"),
        "tied": reader.flag("ensure_weight_tying"),
        "base": reader.text("base_model_name_or_path"),
        "selection": selection_of(reader.found),
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


def _velora(reader: Values) -> tuple[str, ...]:
    if not reader.found.get("velora_config"):
        return ()
    return ("it was trained with VeLoRA, which approximates gradients; training goes on with exact ones",)


def _unsupported(found: Mapping[str, object], kind: object) -> list[str]:
    wrong = list(fields.problems(found))
    start = found.get("init_lora_weights", True)
    # AdaLoRA's start does not depend on the name.
    plain = start is None or isinstance(start, bool) or start in fields.PLAIN_STARTS
    if kind == "LORA" and not plain:
        wrong.append(f"'init_lora_weights' is {shown(start)}: {fields.CHANGED_BASE}")
    return wrong
