"""Write a PEFT folder: settings, tensors and a model card."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from tunerkit.errors import first
from tunerkit.plugin import ConfigError, FileError, copies_of
from tunerkit_peft.card import card
from tunerkit_peft.files import CONFIG, WEIGHTS
from tunerkit_peft.forms import Written, adalora, compact, uniform
from tunerkit_peft.options import PeftOptions
from tunerkit_peft.pieces import Piece, pieces_of, trained_biases
from tunerkit_peft.places import modules_of
from tunerkit_peft.selecting import modules_to_save, target_modules
from tunerkit_peft.weights import PREFIX

if TYPE_CHECKING:
    from tunerkit.plugin import Tuner

_VERSION: Final = "0.21.2"  # of peft, whose format this is
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
    pieces = pieces_of(tuner)
    biases = trained_biases(tuner, pieces)
    form = _form(tuner, pieces, options)
    base = options.base if options.base is not None else _name_of(tuner)
    settings = {**_settings(tuner, pieces, base), **form.settings, "bias": biases.setting}
    tensors = _cast(form.tensors, options.dtype)
    tensors |= {f"{at}.{name}": each for at, own in copies_of(tuner).items() for name, each in own.items()}
    tensors |= biases.tensors
    config, weights, readme = path / CONFIG, path / WEIGHTS, path / _CARD
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    readme.write_text(card(tuner, base, settings, pieces), encoding="utf-8")
    save_file({PREFIX + name: each for name, each in _apart(tensors).items()}, weights, metadata={"format": "pt"})
    shutil.copymode(config, weights)  # safetensors makes files that only their owner can read
    return [config, weights, readme]


def _form(tuner: "Tuner", pieces: list[Piece], options: PeftOptions) -> Written:
    if options.form == "uniform":
        return uniform(pieces, options.rank)
    if options.rank is not None:
        raise ConfigError([f"form {options.form!r} keeps the rank of each module; leave the option out @ $.rank"])
    if options.form == "compact":
        return compact(pieces)
    return adalora(pieces, tuner.total_steps or tuner.steps)


def _settings(tuner: "Tuner", pieces: list[Piece], base: str) -> dict[str, object]:
    """The settings that every form has. Fields at their defaults are left out where an old PEFT lacks them."""
    present = modules_of(tuner.model)
    owners = {piece.owner for piece in pieces}
    copies = copies_of(tuner)
    causal = type(tuner.model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    return {
        "peft_type": "LORA",
        "peft_version": _VERSION,
        # Of other tasks PEFT's own model classes change the forward or add modules, so they are left unnamed.
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "target_modules": target_modules(owners, present),
        "modules_to_save": modules_to_save(copies, owners, present) if copies else None,
        "lora_dropout": tuner.config.dropout,
        "fan_in_fan_out": any(type(piece.module).__name__ == "Conv1D" for piece in pieces),
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _name_of(tuner: "Tuner") -> str:
    name = getattr(getattr(tuner.model, "config", None), "_name_or_path", "")
    return name if isinstance(name, str) else ""


def _cast(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    wanted: torch.dtype = getattr(torch, dtype)
    largest = torch.finfo(wanted).max
    if wrong := [name for name, each in tensors.items() if each.numel() and float(each.abs().max()) > largest]:
        raise FileError(
            "\n- ".join([f"some values are above {largest:g}, the largest of {dtype}; use bfloat16:", *first(wrong)])
        )
    return {name: each.to(wanted) for name, each in tensors.items()}


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
