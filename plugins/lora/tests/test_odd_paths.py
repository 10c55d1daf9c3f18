"""Operations besides training with LoRA: autocast, half-precision adapters, workers."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tunerkit
from tests.support import spawned
from tunerkit import injection
from tunerkit_testing.small import TARGETS, X, net, trainable


def wrapped(**changes: Any) -> Any:
    return tunerkit.wrap(net(), "lora", {"targets": TARGETS, "rank": 3, **changes}, seed=0)


def train(model: nn.Module, dtype: torch.dtype | None = None, steps: int = 10) -> None:
    optimizer = torch.optim.SGD(trainable(model), lr=0.2)
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = (model(X) - 1).float().square().mean()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
def test_half_precision_trains_as_full_precision_within_its_digits(
    dtype: torch.dtype | None, adapter_dtype: str
) -> None:
    """With or without CPU autocast, adapters in any dtype: outputs agree within the coarsest dtype's tolerance."""
    plain, model = wrapped(), wrapped(adapter_dtype=adapter_dtype)
    train(plain)
    train(model, dtype)
    assert {p.dtype for p in tunerkit.tuner(model).parameters()} == {getattr(torch, adapter_dtype)}
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        output = model(X)
    assert output.dtype == (dtype or torch.float32)
    assert (output - plain(X)).abs().max() <= 0.03 * plain(X).abs().max()
    assert not torch.allclose(plain(X), wrapped()(X), atol=0.05)


def test_a_spawned_worker_trains_the_model_it_is_sent() -> None:
    """A new interpreter gets the wrapped model: its outputs, ranks and further training are the same."""
    model = wrapped()
    train(model)
    spawned.check_trains_in_a_worker(model)
    assert tunerkit.tuner(model).ranks() == {"0": 3, "2": 3, "4": 3}
    assert not tunerkit.tuner(model).steps


@pytest.mark.parametrize("config", [{"targets": ["embed_tokens"]}, {"train_modules": ["embed_tokens"]}])
def test_embeddings_that_were_resized_after_wrapping_are_not_saved(config: dict[str, Any], tmp_path: Path) -> None:
    """The table is resized in place: an adapter or a copy of the old one fits no base."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaModel(transformers.LlamaConfig(vocab_size=20, num_key_value_heads=2, **sizes))
    tunerkit.wrap(model, "lora", config)
    tunerkit.save(model, tmp_path / "before")
    model.resize_token_embeddings(24)
    with pytest.raises(tunerkit.errors.AdapterError, match=r"embed_tokens: the Embedding was resized"):
        tunerkit.save(model, tmp_path / "after")
    assert not (tmp_path / "after").exists()


def test_an_adapter_with_nan_in_one_factor_is_not_called_untrained(tmp_path: Path) -> None:
    """The other factor is 0 throughout, but 0 times NaN is NaN: the model's output shows it."""
    model: Any = tunerkit.wrap(nn.Sequential(nn.Linear(4, 4)), "lora", {"targets": ["0"]})
    with torch.no_grad():
        next(tunerkit.tuner(model).parameters()).view(-1)[0] = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tunerkit.save(model, tmp_path, allow_nonfinite=True)
    assert not injection.adds_nothing(tunerkit.tuner(model))
