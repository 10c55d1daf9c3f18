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
