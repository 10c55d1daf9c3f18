"""The law of base layers: an adapter's output equals that of a float64 layer with its product in the weight."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tunerkit.hooks import gather_knowledge
from tunerkit.layers import BaseLayer, as_base_layer


def known(module: str) -> Any:
    """A module of transformers, whose layers the plugin knows; the test is skipped where either is missing."""
    pytest.importorskip("tunerkit_transformers")
    return pytest.importorskip(module)


def built(name: str) -> tuple[Any, Tensor]:
    """A layer of each kind in fp32 with random weights, and an input for it; skipped where nothing knows it."""
    module, x = nn.Module(), torch.arange(6).reshape(2, 3) % 5
    if name == "linear":
        module, x = nn.Linear(5, 4), torch.randn(2, 3, 5)
    elif name == "conv1d":
        module, x = nn.Conv1d(2, 3, 3, padding="same", padding_mode="circular"), torch.randn(2, 2, 3)
    elif name == "conv2d":
        module, x = nn.Conv2d(4, 2, (2, 1), groups=2, stride=2, padding=1), torch.randn(1, 4, 3, 2)
    elif name == "conv3d":
        module, x = nn.Conv3d(1, 2, 2, dilation=2, padding=1, padding_mode="reflect"), torch.randn(1, 1, 3, 3, 3)
    elif name == "embedding":
        module = nn.Embedding(5, 4, padding_idx=1)
    elif name == "transposed":
        module, x = known("transformers.pytorch_utils").Conv1D(6, 5), torch.randn(2, 3, 5)
    else:
        gemma = known("transformers.models.gemma3.modeling_gemma3")
        module = gemma.Gemma3TextScaledWordEmbedding(5, 4, 1, embed_scale=3.0)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module, x


def random_(module: nn.Module) -> nn.Module:
    """The module in float64 with random values, including the row of a padding_idx, as in pretrained tables."""
    for parameter in module.double().parameters():
        nn.init.normal_(parameter)
    return module


def described(module: nn.Module) -> BaseLayer:
    """The module's kind; fails if it has none."""
    base = as_base_layer(module, gather_knowledge().kinds)
    assert base is not None
    return base


def merged(module: nn.Module, delta: Tensor) -> nn.Module:
    """A copy of the module with ``delta`` (out, in) added to its weight, each layout written out by hand."""
    other: Any = copy.deepcopy(module)
    if isinstance(other, nn.Embedding):
        added = torch.stack([column for column in delta.unbind(1)])
        if other.padding_idx is not None:
            added[other.padding_idx] = 0
    elif type(other).__name__ == "Conv1D":
        added = torch.stack([column for column in delta.unbind(1)])
    else:
        added = delta.reshape(other.weight.shape)
    with torch.no_grad():
        other.weight += added
    return other  # type: ignore[no-any-return]


def matrices(base: BaseLayer, rank: int) -> tuple[Tensor, Tensor]:
    """Random q (r, in) and p (out, r)."""
    q = torch.randn(rank, base.in_features, dtype=torch.float64)
    return q, torch.randn(base.out_features, rank, dtype=torch.float64)


def check_law(module: nn.Module, x: Tensor, rank: int) -> None:
    """The law in `BaseLayer`'s docstring, within 1e-10."""
    base = described(module)
    q, p = matrices(base, rank)
    with torch.no_grad():
        delta = base.project_out(base.project_in(x, q), p)
        y = module(x)
        expected = merged(module, p @ q)(x)
    assert delta.shape == y.shape
    torch.testing.assert_close(y + delta, expected, rtol=1e-10, atol=1e-10)
