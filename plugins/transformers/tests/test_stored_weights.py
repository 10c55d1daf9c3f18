"""Whether a model has the weights of its checkpoint, by samples."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tunerkit_transformers.stored_weights import differs_from_stored


@pytest.fixture(params=["one file", "shards"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint of a small Llama in one file or in several."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 61}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes))
    model.save_pretrained(tmp_path, max_shard_size="1GB" if request.param == "one file" else "8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if request.param == "one file" else 4)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_as_it_was_loaded_does_not_differ(dtype: torch.dtype, folder: Path) -> None:
    """In any dtype, also where a part was cast again afterwards."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    assert not differs_from_stored(model, dtype, {})
    model.lm_head.float()
    assert not differs_from_stored(model, dtype, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
def test_a_parameter_with_other_values_differs(name: str, dtype: torch.dtype, folder: Path) -> None:
    """One changed parameter is enough, wherever its values are changed by a fine-tuning."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        model.get_parameter(name).mul_(1.01)
    assert differs_from_stored(model, dtype, {})
    assert not differs_from_stored(model, dtype, {"gguf_file": "model.gguf"})  # what would be loaded is not known


def test_parameters_of_other_shapes_prove_nothing(folder: Path) -> None:
    """Loading may cut or transpose a stored tensor, so only the same shape can be compared."""
    model = LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(70)
    assert not differs_from_stored(model, torch.float32, {})


def test_without_files_to_compare_with_nothing_is_claimed(folder: Path) -> None:
    """The folder is gone, its files are damaged, or it has weights of another format."""
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    for file in folder.glob("*.safetensors"):
        file.write_bytes(b"no safetensors")
    assert not differs_from_stored(model, torch.float32, {})
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    assert not differs_from_stored(model, torch.float32, {})
