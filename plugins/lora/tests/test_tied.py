"""LoRA at both sides of a tied weight computes what PEFT's does, and leaves as one plain model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tunerkit
from tunerkit_lora import LoraConfig

IDS = torch.arange(12).reshape(3, 4)
SIDES = ("embed_tokens", "lm_head")


def llama() -> Any:
    """A small decoder with tied embeddings, the same at every call."""
    transformers = pytest.importorskip("transformers", reason="the model is transformers'")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(vocab_size=20, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
        return transformers.LlamaForCausalLM(config).eval()


def logits(model: Any) -> Tensor:
    found: Tensor = model(IDS).logits
    return found


def train(model: Any, parameters: list[torch.nn.Parameter]) -> None:
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for _ in range(4):
        torch.nn.functional.cross_entropy(logits(model).flatten(0, 1), IDS.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`|Model with `tie_word_embeddings=True`")
@pytest.mark.parametrize("how", ["targets", "train_modules"])
def test_both_sides_learn_what_pefts_learn(how: str) -> None:
    """From the same values, a few steps end at the same output: in PEFT too, each side changes on its own."""
    peft = pytest.importorskip("peft", reason="peft is the peer that this test compares with")
    names = {"target_modules": [*SIDES, "q_proj"]} if how == "targets" else {"target_modules": ["q_proj"]}
    whole = {} if how == "targets" else {"modules_to_save": list(SIDES)}
    # In fp64: in fp32, four steps at this rate may end further apart than two ways of computing one output.
    theirs = peft.get_peft_model(llama().double(), peft.LoraConfig(r=4, lora_alpha=8, **names, **whole)).double()
    ours = tunerkit.wrap(
        llama().double(),
        "lora",
        LoraConfig(
            rank=4,
            alpha=8,
            targets=tuple(names["target_modules"]),
            train_modules=SIDES if how == "train_modules" else (),
            adapter_dtype="float64",
        ),
    )
    for path, adapter in tunerkit.tuner(ours).adapters().items():
        peer, own = theirs.base_model.model.get_submodule(path), dict(adapter.named_parameters())
        embedding = "default" in peer.lora_embedding_A
        a, b = (peer.lora_embedding_A, peer.lora_embedding_B) if embedding else (peer.lora_A, peer.lora_B)
        for name, start in (("a", a), ("b", b)):
            own[name].data.copy_(start["default"] if embedding else start["default"].weight)
    train(theirs, [p for p in theirs.parameters() if p.requires_grad])
    train(ours, list(tunerkit.tuner(ours).parameters()))
    expected = logits(theirs)
    assert not torch.allclose(expected, logits(llama().double()), atol=1e-3)
    assert (logits(ours) - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_a_merged_model_is_written_and_read_with_both_weights(tmp_path: Path) -> None:
    """After unwrap(keep_merged=True) save_pretrained writes both sides, and another program reads the same model."""
    model = tunerkit.wrap(llama(), "lora", LoraConfig(rank=4, targets=(*SIDES, "q_proj")), seed=0)
    train(model, list(tunerkit.tuner(model).parameters()))
    output = logits(model)
    tunerkit.unwrap(model, keep_merged=True).save_pretrained(tmp_path)
    assert model.config.tie_word_embeddings is False
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    assert (logits(again) - output).abs().max() <= 1e-5 * output.abs().max()
