"""Kohya's names of modules: the path with "_" for ".", behind a prefix for the part of the pipeline."""

import re
from collections.abc import Iterable
from typing import Final

from torch import nn

from tunerkit.plugin import FileError
from tunerkit_diffusers.components import TEXT_ENCODERS, is_flattened_text_model
from tunerkit_diffusers.ldm_names import ldm_names

# The longest prefix that fits counts. The first one of each component is written.
PREFIXES: Final = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
_RESNET = r"resnets\.\d+\.(conv1|conv2|time_emb_proj|conv_shortcut)"
_ATTENTION = (
    r"attentions\.\d+\.(proj_in|proj_out|(transformer_blocks\.\d+\.attn[12]\.)?to_(q|k|v|out\.0)"
    r"|transformer_blocks\.\d+\.ff\.net\.(0\.proj|2))"
)
# diffusers turns "_" back into "." by a list of known words. These are the modules that its list covers.
_UNET = re.compile(
    r"conv_in|conv_out|(time|add)_embedding\.linear_[12]"
    rf"|mid_block\.({_RESNET}|{_ATTENTION})"
    rf"|(down|up)_blocks\.\d+\.({_RESNET}|{_ATTENTION}|(down|up)samplers\.0\.conv)"
)
_TEXT = re.compile(r"text_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])")
# Only under this name does diffusers find them.
_ORIGINAL: Final = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}


def spelled(path: str, component: str, model: nn.Module) -> str:
    """Return the name of a module in a file that is to be written.

    Args:
        path: The module's path.
        component: The part of the pipeline that the model is.
        model: The model.

    Raises:
        FileError: diffusers would not find the module under the name that Kohya's rule gives.
    """
    full = full_path(path, component, model)
    pattern = _TEXT if component in TEXT_ENCODERS else _UNET
    if not pattern.fullmatch(full):
        raise FileError(
            f"format 'kohya' has no name for {path!r} that diffusers reads: it knows the attention, feed-forward and "
            "resnet layers of Stable Diffusion's UNets and CLIP text encoders. Use format='diffusers', or leave it out "
            f"of the targets (exclude=({path!r},))"
        )
    prefix = next(prefix for prefix, part in PREFIXES.items() if part == component)
    return prefix + _ORIGINAL.get(full, full).replace(".", "_")


def full_path(path: str, component: str, model: nn.Module) -> str:
    """Return a path as files have it: CLIP text encoders have the level ``text_model`` there, also where it is gone."""
    return f"text_model.{path}" if component in TEXT_ENCODERS and is_flattened_text_model(model) else path


def spellings_of(paths: Iterable[str], component: str, model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the paths that each name in a file may stand for, without the name's prefix.

    A UNet's modules have two names each: sd-scripts writes the original ones for Stable Diffusion XL.
    """
    paths = list(paths)
    original = ldm_names(paths) if component == "unet" else {}
    found: dict[str, tuple[str, ...]] = {}
    for path in paths:
        names = {full_path(path, component, model), path, original.get(path, path)}
        for name in {each.replace(".", "_") for each in names}:
            found[name] = (*found.get(name, ()), path)
    return found
