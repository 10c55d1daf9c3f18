"""LN tuning computes and trains what PEFT's does, and merges."""

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import tunerkit
from tunerkit_methods.ln_tuning import TrainedNorm


class Offset(nn.Module):
    """A norm as Gemma's, which multiplies by 1 + its weight."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


KINDS = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm, "as Gemma's": Offset}


def base(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), KINDS[kind](16), nn.Tanh(), nn.Linear(16, 8)).double()
    with torch.no_grad():
        for parameter in model[1].parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_computes_and_trains_as_peft_does(kind: str) -> None:
    """In fp64, away from the start: output and gradients to 1e-12, and both tensors after 20 steps of AdamW to 1e-9."""
    theirs: Any = peft.get_peft_model(copy.deepcopy(base(kind)), peft.LNTuningConfig(target_modules=["1"]))
    ours = tunerkit.wrap(base(kind), "ln-tuning", {"adapter_dtype": "float64"})
    other = theirs.base_model.model.get_submodule("1").ln_tuning_layers["default"]
    adapter = tunerkit.tuner(ours).adapters()["1"]
    assert isinstance(adapter, TrainedNorm)
    pairs = [(adapter.get_parameter(name), each) for name, each in other.named_parameters()]
    assert len(pairs) == len(list(adapter.parameters()))
    with torch.no_grad():
        for mine, each in pairs:
            assert torch.equal(mine, each)
            each.add_(0.3 * torch.randn_like(each))
            mine.copy_(each)
    x = torch.randn(20, 5, 12, dtype=torch.float64)
    outputs = [model(x[0]) for model in (ours, theirs)]
    assert (outputs[0] - outputs[1]).abs().max() <= 1e-12 * outputs[1].abs().max()
    grads = [torch.autograd.grad(outputs[at].square().sum(), [pair[at] for pair in pairs]) for at in (0, 1)]
    for mine, each in zip(*grads, strict=True):
        assert (mine - each).abs().max() <= 1e-12 * each.abs().max()
    for at, model in enumerate((ours, theirs)):
        optimizer = torch.optim.AdamW([pair[at] for pair in pairs], lr=1e-2)
        for batch in x:
            model(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for mine, each in pairs:
        assert (mine - each).abs().max() <= 1e-9
    adapted = ours(x)
    merged: Any = tunerkit.unwrap(ours, keep_merged=True)
    torch.testing.assert_close(merged(x), adapted)
    for name, each in other.named_parameters():
        torch.testing.assert_close(merged[1].get_parameter(name).detach(), each.detach())


def test_adapts_all_norms_by_default() -> None:
    """Norms in the model, and nothing else."""
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 6), nn.RMSNorm(6)))
    assert tunerkit.tuner(tunerkit.wrap(model, "ln-tuning")).adapters().keys() == {"1", "2.1"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapter_dtype", ["float64", "float32", "bfloat16"])
def test_starts_at_the_base_whatever_the_dtypes(dtype: torch.dtype, adapter_dtype: str) -> None:
    """The first output is the base's, bit for bit: the difference is taken after rounding."""
    model, x = base("LayerNorm").to(dtype), torch.randn(3, 12, dtype=dtype)
    before = model(x)
    assert torch.equal(tunerkit.wrap(model, "ln-tuning", {"adapter_dtype": adapter_dtype})(x), before)
