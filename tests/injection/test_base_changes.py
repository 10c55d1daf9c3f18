"""What no adapter's file holds: base parameters that are trained too, and embeddings resized after wrapping."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tunerkit
from tests.support.model_checks import fit, sgd, told
from tests.support.toys import Toys

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}


def lines(call: Callable[[], object]) -> list[str]:
    """The warnings of a call, each of one line, which name the caller's line."""
    texts = told(call, __file__)
    assert not any("\n" in text for text in texts)
    return texts


def thaw_norm(model: Any) -> None:
    model.norm.requires_grad_(True)


def thaw_all(model: Any) -> None:
    model.requires_grad_(True)


def replace_norm(model: Any) -> None:
    model.norm = nn.LayerNorm(8)


@pytest.mark.parametrize("change", [thaw_norm, thaw_all, replace_norm])
def test_what_is_trained_beside_an_adapter_is_named_at_attach_and_at_save(
    toys: "Toys", change: Callable[[Any], None], tmp_path: Path
) -> None:
    """The file fits no other base. Each warning says how the adapter would hold it; saving the base too works."""
    model = tunerkit.wrap(toys.net(), "toy-low-rank", {"targets": ["layers.0"]})
    change(model)
    optimizer = sgd(model)
    texts = [lines(lambda: tunerkit.attach(model, optimizer))]
    fit(model, optimizer, toys.x())
    texts.append(lines(lambda: tunerkit.save(model, tmp_path / "out")))
    for found in texts:
        assert len(found) == 1
        assert ("and 11 more" if change is thaw_all else "gradients: norm.weight, norm.bias.") in found[0]
        assert ("train_modules=['conv'" if change is thaw_all else "train_modules=['norm']") in found[0]
        assert "save the base too, inside tunerkit.disabled(model)" in found[0]
    with pytest.raises(tunerkit.errors.BaseMismatchError):
        tunerkit.load(toys.net(), tmp_path / "out")
    with tunerkit.disabled(model):
        state = {name: tensor for name, tensor in model.state_dict().items() if ".tunerkit." not in name}
    base = toys.net()
    base.load_state_dict(state)
    assert toys.close(tunerkit.load(base, tmp_path / "out")(toys.x()), model(toys.x()))


def test_what_follows_the_advice_is_silent(toys: "Toys", tmp_path: Path) -> None:
    """Trained as a copy, frozen again, and under a copy that is used instead: the file is whole."""
    model = tunerkit.wrap(toys.net(), "toy-low-rank", {"targets": ["layers.0"], "train_modules": ["norm", "head"]})
    model.norm.get_parameter("weight").requires_grad_(True)
    thaw_all(model.head)
    model.conv.requires_grad_(True)
    model.conv.requires_grad_(False)
    assert lines(lambda: tunerkit.attach(model, sgd(model))) == []
    toys.fill_(model)
    assert lines(lambda: tunerkit.save(model, tmp_path / "out")) == []
    assert lines(lambda: tunerkit.load(toys.net(), tmp_path / "out")) == []


def llama(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    if not (folder / "llama").exists():
        config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
        transformers.LlamaForCausalLM(config).save_pretrained(folder / "llama")
    return transformers.LlamaForCausalLM.from_pretrained(folder / "llama")


@pytest.mark.parametrize("way", ["wrap", "load"])
def test_embeddings_that_were_resized_after_wrapping_are_named(toys: "Toys", way: str, tmp_path: Path) -> None:
    """Their new rows are random, so the file fits no other process: `attach` says it, and `save` at the latest."""
    model = tunerkit.wrap(llama(tmp_path), "toy-low-rank", {"targets": ["q_proj"]})
    if way == "load":
        toys.fill_(model)
        assert lines(lambda: tunerkit.save(model, tmp_path / "before")) == []
        model = tunerkit.load(llama(tmp_path), tmp_path / "before", trainable=True)
    model.resize_token_embeddings(24)
    texts = [lines(lambda: tunerkit.attach(model, sgd(model)))]
    toys.fill_(model)
    texts.append(lines(lambda: tunerkit.save(model, tmp_path / "out")))
    for found in texts:
        assert len(found) == 1
        assert "embed_tokens.weight [20, 16] -> [24, 16], lm_head.weight [20, 16] -> [24, 16]" in found[0]
        assert "Resize the model before tunerkit.wrap" in found[0]


def test_a_model_that_was_resized_before_the_adapter_was_put_in_is_silent(toys: "Toys", tmp_path: Path) -> None:
    """Also if an older adapter was there before: only that one's file lacks the rows. A cast is no change of size."""
    model = tunerkit.wrap(llama(tmp_path), "toy-low-rank", {"targets": ["q_proj"]})
    model.resize_token_embeddings(24)
    tunerkit.wrap(model, "toy-low-rank", {"targets": ["q_proj"], "exclude": ["embed_tokens", "lm_head"]}, adapter="new")
    toys.fill_(model.to(torch.bfloat16))
    assert lines(lambda: tunerkit.save(model, tmp_path / "new", adapter="new")) == []
    assert len(lines(lambda: tunerkit.save(copy.deepcopy(model), tmp_path / "old", adapter="default"))) == 1
