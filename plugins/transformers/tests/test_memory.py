"""The memory of a step: the estimate of activations against what autograd keeps, and what is free by device."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import tunerkit
from tunerkit_transformers import memory
from tunerkit_transformers.memory import GIB, activation_bytes, fits, free_bytes

CPU = torch.device("cpu")
SHAPES: dict[str, Any] = {"vocab_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8}


def kept_bytes(model: Any, ids: Tensor, **more: Any) -> int:
    """What a forward keeps for its backward, beside parameters; each storage counts once."""
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(input_ids=ids, **more)
    assert output.logits.requires_grad
    return sum(size for place, size in kept.items() if place not in own)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(hidden_size=256, intermediate_size=688, num_key_value_heads=2, **SHAPES)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=256, n_layer=3, n_head=8, vocab_size=64)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(d_model=256, d_kv=32, d_ff=512, num_layers=3, vocab_size=64)),
}


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize("name", MODELS)
def test_the_estimate_is_near_what_autograd_keeps(name: str) -> None:
    """Law: within 20 % for a batch of 4 x 64 tokens. Random numbers and the mode of the model stay as they were."""
    model = tunerkit.wrap(MODELS[name](), "toy-low-rank", {"targets": "all-linear"}, seed=0).eval()
    state = torch.get_rng_state()
    found = activation_bytes(model, 4 * 64)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    ids = torch.ones(4, 64, dtype=torch.int64)
    more = {"decoder_input_ids": ids} if name == "t5" else {"logits_to_keep": 1}
    assert 0.8 < found / kept_bytes(model.train(), ids, **more) < 1.2
    weights = sum(each.numel() for each in model.parameters() if not each.requires_grad)  # cast once, and kept
    assert 0.4 < (activation_bytes(model, 4 * 64, torch.bfloat16) - 2 * weights) / found < 1


def test_a_cpu_has_what_is_available_within_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's, the container's, which may be 'max', and the user's own, of which the process has taken a part."""
    taken = psutil.Process().memory_info().rss
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GIB))
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "_LIMITS", (limit, tmp_path / "none"))
    assert free_bytes(CPU) == 64 * GIB
    limit.write_text("max\n")
    assert free_bytes(CPU) == 64 * GIB
    limit.write_text(f"{32 * GIB}\n")
    assert free_bytes(CPU) == pytest.approx(32 * GIB - taken, rel=0.01)
    assert free_bytes(CPU, 16 * GIB) == pytest.approx(16 * GIB - taken, rel=0.01)


def test_a_gpu_has_what_is_free_and_what_torch_has_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than that if the user says so; another accelerator does not say it."""
    for name, value in {"mem_get_info": (5, 80), "memory_reserved": 9, "memory_allocated": 7}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    cuda = torch.device("cuda")
    assert free_bytes(cuda) == 7
    assert free_bytes(cuda, 10) == 3
    assert free_bytes(torch.device("mps")) is None


def test_a_step_fits_with_room_to_spare() -> None:
    """A fifth is left free, and without knowledge everything fits."""
    assert fits(80, 100)
    assert not fits(81, 100)
    assert fits(10**15, None)
