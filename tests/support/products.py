"""A layer with low-rank products, as `tunerkit.wrap` would adapt it, without a method."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tunerkit.hooks import gather_knowledge
from tunerkit.injection.slots import Slot, Slots, apply_slots
from tunerkit.layers import as_base_layer
from tunerkit.layers.low_rank import add_low_rank
from tunerkit.plugin import Adapter, BaseLayer


class Product(Adapter):
    """Q (r, in), λ (r,) or None, P (out, r), with no value near 0."""

    def __init__(self, base: BaseLayer, rank: int, *, diagonal: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.randn(rank, base.in_features))
        self.p = nn.Parameter(torch.randn(base.out_features, rank))
        self.lam = nn.Parameter(torch.randn(rank)) if diagonal else None
        self.dropout = dropout

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return add_low_rank(base, x, y, q=self.q, p=self.p, lam=self.lam, scale=0.7, dropout=self.dropout)


def adapted(layer: nn.Module, *adapters: Callable[[BaseLayer], Adapter]) -> Any:
    """``layer``, frozen, with adapters as `tunerkit.wrap` adds them."""
    base = as_base_layer(layer.requires_grad_(False), gather_knowledge().kinds)
    assert base is not None
    slots = Slots(base)
    for number, make in enumerate(adapters or (lambda base: Product(base, 3),)):
        slots.put(str(number), Slot(adapter=make(base)))
    layer.add_module("tunerkit", slots)
    layer.register_forward_hook(apply_slots, with_kwargs=True)
    return layer
