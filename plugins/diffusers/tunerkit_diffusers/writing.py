"""Write an adapter under diffusers' or Kohya's names."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from tunerkit.plugin import ConfigError, Factors, FileError, Tuner, biases_of, copies_of, factors_of
from tunerkit_diffusers.components import COMPONENTS, TEXT_ENCODERS, component_to_write
from tunerkit_diffusers.diffusers_names import names_of
from tunerkit_diffusers.diffusers_reading import FILE
from tunerkit_diffusers.kohya_names import PREFIXES, spelled
from tunerkit_diffusers.lora_file import write_file
from tunerkit_diffusers.metadata import ENTRY
from tunerkit_diffusers.options import DiffusersOptions, KohyaOptions
from tunerkit_diffusers.padding import padded
from tunerkit_diffusers.places import Place, place_at

KOHYA_FILE: Final = "lora.safetensors"
_TEXT_LEAVES: Final = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def write_diffusers(tuner: Tuner, path: Path, options: DiffusersOptions) -> list[Path]:
    """Write ``pytorch_lora_weights.safetensors`` into a folder, for ``load_lora_weights`` and ``load_lora_adapter``.

    Raises:
        FileError: The adapter holds what such files cannot.
        ConfigError: The model's class does not tell which part of a pipeline it is, or the form is not possible there.
    """
    component = component_to_write(tuner.model, options.component, COMPONENTS)
    factors = _factors(tuner, "diffusers", component)
    if options.form == "compact":
        if component in TEXT_ENCODERS:
            raise ConfigError(["diffusers reads no ranks per module for text encoders; use 'uniform' @ $.form"])
        # diffusers refuses rank 0. At least one module stays: a file without tensors is no adapter.
        factors = {at: each for at, each in factors.items() if each.rank} or dict(list(padded(factors).items())[:1])
    else:
        factors = padded(factors)
    tensors: dict[str, Tensor] = {}
    for at, each in factors.items():
        down, up = names_of(at, component, tuner.model)
        tensors |= _pair(place_at(tuner.model, at, "diffusers"), each, down, up)
    metadata = {"format": "pt"}
    if component not in TEXT_ENCODERS:  # there, diffusers takes the layers from the metadata and not from the tensors
        metadata[ENTRY] = json.dumps(_settings(factors, component), indent=2, sort_keys=True)
    write_file(path / FILE, tensors, metadata)
    return [path / FILE]


def write_kohya(tuner: Tuner, path: Path, options: KohyaOptions) -> list[Path]:
    """Write ``lora.safetensors`` into a folder, under Kohya's names.

    Every module gets one rank, and alpha is that rank: diffusers gives alphas that differ to the wrong modules, without
    an error.

    Raises:
        FileError: The adapter holds what such files cannot.
        ConfigError: The model's class does not tell which part of a pipeline it is.
    """
    allowed = tuple(dict.fromkeys(PREFIXES.values()))
    component = component_to_write(tuner.model, options.component, allowed)
    if component not in allowed:
        raise FileError(
            f"format 'kohya' has no names for the modules of a {type(tuner.model).__name__}: they follow the original "
            "checkpoint, which has q, k and v in one. Use format='diffusers'"
        )
    factors = padded(_factors(tuner, "kohya", component))
    if component in TEXT_ENCODERS:
        factors |= _marker(factors, tuner.model)
    tensors: dict[str, Tensor] = {}
    rank = 0
    for at, each in factors.items():
        name, rank = spelled(at, component, tuner.model), each.rank
        place = place_at(tuner.model, at, "kohya")
        if len(place.inner) not in (1, 3):
            raise FileError(
                f"format 'kohya' holds linear layers and 2-D convolutions only, and {at!r} is another convolution. Use "
                f"format='diffusers', or leave it out of the targets (exclude=({at!r},))"
            )
        tensors |= _pair(place, each, f"{name}.lora_down.weight", f"{name}.lora_up.weight")
        tensors[f"{name}.alpha"] = torch.tensor(float(rank))
    size = str(rank)
    metadata = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": size,
        "ss_network_alpha": size,
        "ss_network_args": json.dumps({"conv_dim": size, "conv_alpha": size}),
    }
    write_file(path / KOHYA_FILE, tensors, metadata)
    return [path / KOHYA_FILE]


def _factors(tuner: Tuner, format: str, component: str) -> dict[str, Factors]:
    """Return the adapter's products, or refuse what such files cannot hold."""
    for found, what in ((copies_of(tuner), "modules trained in full"), (biases_of(tuner), "trained biases")):
        if found:
            raise FileError(
                f"format {format!r} cannot hold {what}, and this adapter has some: {', '.join(list(found)[:5])}. Call "
                "tunerkit.unwrap(model, keep_merged=True) and save the whole model, or train without them"
            )
    factors = factors_of(tuner)
    if component in TEXT_ENCODERS:
        for path in factors:
            if path.rpartition(".")[2] not in _TEXT_LEAVES:
                raise FileError(
                    f"diffusers does not load adapters of {path!r}: in text encoders it knows {', '.join(_TEXT_LEAVES)}"
                    f". Leave it out of the targets (exclude=({path!r},))"
                )
    return factors


def _pair(place: Place, factors: Factors, down: str, up: str) -> dict[str, Tensor]:
    return {down: place.down(factors.q), up: place.up(factors.p)}


def _settings(factors: Mapping[str, Factors], component: str) -> dict[str, object]:
    """Return the settings of PEFT with which diffusers loads these tensors: the scale is 1 everywhere."""
    ranks = {path: each.rank for path, each in factors.items()}
    ((common, _),) = Counter(ranks.values()).most_common(1)
    # PEFT matches the end of a path. The anchor makes it the whole path.
    pattern = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != common}
    settings: dict[str, object] = {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
    }
    return {f"{component}.{name}": value for name, value in settings.items()}


def _marker(factors: Mapping[str, Factors], model: nn.Module) -> dict[str, Factors]:
    """Return a product of zeros at an output projection, if attention is adapted elsewhere only.

    diffusers knows Kohya's names of a text encoder's attention only by that module. Without it, it leaves out the
    others, or raises.
    """
    owners = [path.rpartition(".")[0] for path in factors if path.endswith(("q_proj", "k_proj", "v_proj"))]
    if not owners or any(path.endswith(".out_proj") for path in factors):
        return {}
    path = f"{owners[0]}.out_proj"
    place = place_at(model, path, "kohya")
    like = next(iter(factors.values()))
    q, p = like.q.new_zeros(like.rank, *place.inner), like.p.new_zeros(place.out, like.rank)
    return {path: Factors(q=q, p=p)}
