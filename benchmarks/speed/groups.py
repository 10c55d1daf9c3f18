"""Which layers of known architectures read one input, and the memory of their groups, in seconds.

The command is ``python -m benchmarks.speed.groups``. Models are small and random, so the limits of width and size are
lifted; every linear layer has LoRA.
"""

import warnings
from collections.abc import Mapping
from typing import Any
from unittest import mock

import attrs
import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.utils import logging

import tunerkit
from benchmarks.speed import contenders as who
from benchmarks.speed.shapes import Shape, build
from benchmarks.speed.storages import peak_bytes
from tunerkit.layers import fused

_MIB = 2**20
WIDE = Shape(2, 1024, 2, 128)
_SIZES: Mapping[str, Any] = {
    **{"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
_GROUPED: Mapping[str, Any] = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8}
_ENCODER: Mapping[str, Any] = {**_SIZES, "embedding_size": 32}
_GPT: Mapping[str, Any] = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
_TWO: Mapping[str, Any] = {
    **{"vocab_size": 61, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32},
}
_T5: Mapping[str, Any] = {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_IMAGE: Mapping[str, Any] = {**_SIZES, "image_size": 16, "patch_size": 8}
# By the name of an architecture in transformers: the settings of a small model.
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "olmo2", "phi3", "smollm3"), _GROUPED),
    "mixtral": {**_GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1},
    **dict.fromkeys(("gpt_neox", "phi", "falcon"), _SIZES),
    "gpt2": _GPT,
    "opt": {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
    **dict.fromkeys(("bert", "roberta", "electra", "modernbert"), _ENCODER),
    "distilbert": {"vocab_size": 61, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    **dict.fromkeys(("t5", "mt5"), _T5),
    "bart": _TWO,
    **dict.fromkeys(("vit", "dinov2", "siglip_vision_model"), _IMAGE),
}


def groups_of(architecture: str) -> dict[str, int]:
    """How the layers of one forward ran, as `Tuner.groups` tells it."""
    settings = dict(ARCHITECTURES[architecture])
    torch.manual_seed(0)
    model: Any = AutoModel.from_config(AutoConfig.for_model(architecture, **settings)).train()
    tunerkit.wrap(model, "lora", {"targets": "all-linear", "rank": 2}, seed=0)
    # What comes before the first adapter needs a gradient in training as soon as checkpointing or a soft prompt is on.
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.Conv2d):
            module.register_forward_hook(lambda module, args, output: output.requires_grad_())
    if "image_size" in settings:
        model(pixel_values=torch.randn(2, 3, 16, 16))
    else:
        ids = torch.randint(3, 61, (2, 7))
        model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
    return tunerkit.tuner(model).groups()


def table() -> list[str]:
    """A line for each architecture."""
    lines = ["| architecture | layers in groups | others |", "|---|---|---|"]
    for architecture in ARCHITECTURES:
        found = groups_of(architecture)
        inside = ", ".join(f"{count} {name}" for name, count in found.items() if name.startswith("groups"))
        others = ", ".join(f"{count} {name}" for name, count in found.items() if not name.startswith("groups"))
        lines.append(f"| {architecture} | {inside or 'none'} | {others} |")
    return lines


def peaks(shape: Shape) -> dict[str, float]:
    """MiB of a step's peak: of the model without adapters, and what others add, LoRA with groups and without."""
    built = build(attrs.asdict(shape), "float32", 2, (who.FLOOR, who.PEFT_LORA, who.LORA))

    def peak(name: str) -> float:
        built[name].step()  # the first builds what later ones keep
        return peak_bytes(built[name].step, torch.device("cpu")) / _MIB

    floor, peer, grouped = (peak(name) for name in built)
    with mock.patch.object(fused, "LEAST_WIDTH", 4 * shape.hidden + 1):  # wider than any input
        alone = peak(who.LORA)
    added = {who.PEFT_LORA: peer, "LoRA, in groups": grouped, "LoRA, each layer alone": alone}
    return {who.FLOOR: floor, **{name: found - floor for name, found in added.items()}}


if __name__ == "__main__":
    fused.LEAST_WIDTH = fused.LEAST_NUMBERS = 0
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    print("\n".join(table()))
    print(f"\n| {WIDE.name} | MiB of a step's peak; of adapters, above the floor's |\n|---|---:|")
    print("\n".join(f"| {name} | {found:.1f} |" for name, found in peaks(WIDE).items()))
