"""Small models, and base models as the F32 GGUF files that llama.cpp's converter would write."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from torch import Tensor, nn

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
SIZES: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False, "sliding_window": None,
    "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def meta_lm(model_type: str = "llama", **changes: Any) -> Any:
    """A model with grouped-query attention, without weights."""
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, "head_dim": 8, **changes})
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def causal_lm(model_type: str = "llama", **changes: Any) -> Any:
    """A random model with grouped-query attention whose weights are all far from 0."""
    config = meta_lm(model_type, **changes).config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        for parameter in model.parameters():
            parameter.data = 0.3 * torch.randn_like(parameter) + (1.0 if parameter.ndim == 1 else 0.0)
    return model.eval()


def randomize(model: nn.Module) -> None:
    """Give every trained parameter random values, as after a training."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def write_base(model: Any, place: Path) -> Path:
    """Write a model without adapters as llama.cpp's converter does, with a vocabulary that has no tokenizer."""
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(place, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in _renamed(model, architecture):
        writer.add_tensor(name, np.ascontiguousarray(tensor.float().numpy()))
    write_all(writer)
    return place


def write_all(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _renamed(model: Any, architecture: str) -> Iterator[tuple[str, Tensor]]:
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[architecture], model.config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
        if architecture == "llama" and (count := heads.get(name.split(".")[-2])):
            tensor = _permuted(tensor, count)
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        yield found, tensor


def _permuted(tensor: Tensor, heads: int) -> Tensor:
    """Row by row: row 2 i of a head is row i, and row 2 i + 1 is row i of its second half."""
    size = tensor.shape[0] // heads
    order = [
        head * size + (row // 2 if row % 2 == 0 else size // 2 + row // 2)
        for head in range(heads)
        for row in range(size)
    ]
    return tensor[order]
