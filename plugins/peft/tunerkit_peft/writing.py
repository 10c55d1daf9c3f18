"""Write a PEFT folder: settings, tensors and a model card."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import attrs
import torch
from safetensors.torch import save_file
from torch import Tensor

from tunerkit.errors import first
from tunerkit.plugin import ConfigError, FileError, copies_of, setting
from tunerkit_peft.card import card
from tunerkit_peft.declarations import Declared, declared_by
from tunerkit_peft.declared_writing import below, named, sites_of
from tunerkit_peft.folders import CONFIG, WEIGHTS
from tunerkit_peft.lora_writing import (
    VERSION,
    Piece,
    Site,
    Written,
    adalora,
    compact,
    pieces_of,
    trained_biases,
    uniform,
)
from tunerkit_peft.paths import modules_of
from tunerkit_peft.single_experts import split
from tunerkit_peft.stacks import refuse_lost, stacks_of
from tunerkit_peft.targets import BELOW, modules_to_save, target_modules, target_parameters
from tunerkit_peft.tensors import MODEL, PREFIX

if TYPE_CHECKING:
    from tunerkit.plugin import Tuner


@attrs.frozen
class PeftOptions:
    """The options of ``tunerkit.export(model, folder, format="peft", ...)``. The ``doc`` of each field explains it."""

    form: Literal["own", "uniform", "compact", "adalora", "experts"] | None = setting(
        None,
        doc="own: PEFT's type of the method itself, if the method declares PEFT's names; uniform: a LoRA of one rank, "
        "padded with zeros, which every server reads; compact: a LoRA with the rank of each module; adalora: PEFT's "
        "AdaLoRA; experts: as uniform, with matrices for each expert of a stack, as engines read them; None: own if "
        "the method declares the names, else uniform",
    )
    rank: int | None = setting(
        None,
        ge=1,
        le=4096,
        doc="the rank of the uniform form; None: the next one above all ranks that servers allow",
    )
    base: str | None = setting(
        None, doc="the name of the base model in the files, which some servers compare; None: the one it came from"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = setting(
        "float32", doc="the dtype of the adapter's matrices; the narrower ones round them"
    )


_CARD: Final = "README.md"


def write(tuner: "Tuner", path: Path, options: PeftOptions) -> list[Path]:
    """Write an adapter as PEFT saves one.

    Args:
        tuner: The adapter.
        path: An empty folder.
        options: The form, and what to write into it.

    Returns:
        The files.

    Raises:
        FileError: PEFT cannot hold this adapter.
        ConfigError: The options contradict the adapter or each other.
        AdapterError: The method adds no products.
    """
    declared = declared_by(tuner.method) if options.form in (None, "own") else None
    if declared is None and options.form == "own":
        raise ConfigError(
            [f"method {tuner.method!r} declares no names of PEFT's; leave the option out, for a LoRA @ $.form"]
        )
    form, sites = _products(tuner, options) if declared is None else _named(tuner, declared, options)
    word, inside = ("lora_only", BELOW) if declared is None else (declared.names.bias, below(declared))
    biases = trained_biases(tuner, sites, word)
    base = options.base if options.base is not None else _name_of(tuner)
    has_bias = {"bias": biases.setting} if word else {}
    settings = {**form.settings, **_settings(tuner, sites, base, inside), **has_bias}
    _refuse_lost(tuner, sites, settings, options)
    tensors = _cast(form.tensors, options.dtype)
    tensors |= {f"{at}.{name}": each for at, own in copies_of(tuner).items() for name, each in own.items()}
    tensors |= biases.tensors
    held = {PREFIX + name: each for name, each in tensors.items()}
    held |= {MODEL + name: each for name, each in _cast(form.shared, options.dtype).items()}
    config, weights, readme = path / CONFIG, path / WEIGHTS, path / _CARD
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    readme.write_text(card(tuner, base, settings, sites), encoding="utf-8")
    save_file(_apart(held), weights, metadata={"format": "pt"})
    shutil.copymode(config, weights)  # safetensors makes files that only their owner can read
    return [config, weights, readme]


def _named(tuner: "Tuner", declared: Declared, options: PeftOptions) -> tuple[Written, list[Site]]:
    """PEFT's type of the method itself."""
    if options.rank is not None:
        raise ConfigError(
            [
                f"PEFT's {declared.names.type} keeps the adapter's sizes; leave the option out, or pass form='uniform' "
                "for a LoRA @ $.rank"
            ]
        )
    sites = sites_of(tuner, declared)
    return named(tuner, declared, sites), sites


def _products(tuner: "Tuner", options: PeftOptions) -> tuple[Written, list[Site]]:
    """A LoRA or an AdaLoRA."""
    pieces = pieces_of(tuner)
    has_stacks = any(piece.stack is not None for piece in pieces)
    if options.form == "experts":
        pieces = split(pieces, tuner.model)
    sites = [piece.site for piece in pieces]
    plain = {
        "peft_type": "LORA",
        "lora_dropout": 0.0 if has_stacks else tuner.config.dropout,  # PEFT refuses any for experts
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
    form = _form(tuner, pieces, options)
    return Written({**plain, **form.settings}, form.tensors), sites


def _form(tuner: "Tuner", pieces: list[Piece], options: PeftOptions) -> Written:
    if options.form in (None, "uniform", "experts"):
        return uniform(pieces, options.rank)
    if options.rank is not None:
        raise ConfigError([f"form {options.form!r} keeps the rank of each module; leave the option out @ $.rank"])
    if options.form == "compact":
        return compact(pieces)
    return adalora(pieces, tuner.total_steps or tuner.steps)


def _settings(tuner: "Tuner", sites: Sequence[Site], base: str, inside: Sequence[str]) -> dict[str, object]:
    """The settings that every form has. Fields at their defaults are left out where an old PEFT lacks them."""
    modules = modules_of(tuner.model)
    stacks = stacks_of(modules)
    owners = {site.owner for site in sites if not site.is_parameter}
    present = {*(path for path in modules if path not in stacks), *owners}
    parameters = {site.owner for site in sites if site.is_parameter}
    around = {parameter.rpartition(".")[0] for parameter in parameters}
    copies = copies_of(tuner)
    causal = type(tuner.model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    transposes = any(type(site.module).__name__ == "Conv1D" for site in sites)
    return {
        "peft_version": VERSION,
        # Of other tasks PEFT's own model classes change the forward or add modules, so they are left unnamed.
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "target_modules": target_modules(owners, present),
        **({"target_parameters": target_parameters(parameters, tuner.model)} if parameters else {}),
        "modules_to_save": modules_to_save(copies, owners | around, present, inside) if copies else None,
        **({"fan_in_fan_out": True} if transposes else {}),
    }


def _refuse_lost(tuner: "Tuner", sites: Sequence[Site], settings: Mapping[str, object], options: PeftOptions) -> None:
    refuse_lost(
        settings,
        tuner.model,
        modules_of(tuner.model),
        {site.owner for site in sites if not site.is_parameter},
        [target.path for target in tuner.targets],
        for_engines=options.form == "experts",
    )


def _name_of(tuner: "Tuner") -> str:
    name = getattr(getattr(tuner.model, "config", None), "_name_or_path", "")
    return name if isinstance(name, str) else ""


def _cast(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    wanted: torch.dtype = getattr(torch, dtype)
    largest = torch.finfo(wanted).max
    numbers = {name: each for name, each in tensors.items() if each.is_floating_point()}
    if wrong := [name for name, each in numbers.items() if each.numel() and float(each.abs().max()) > largest]:
        raise FileError(
            "\n- ".join([f"some values are above {largest:g}, the largest of {dtype}; use bfloat16:", *first(wrong)])
        )
    return {**tensors, **{name: each.to(wanted) for name, each in numbers.items()}}


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give each tensor its own memory: safetensors rejects tied ones, which a copy may hold."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if tensor.numel() and place in seen else tensor
        seen.add(place)
    return found
