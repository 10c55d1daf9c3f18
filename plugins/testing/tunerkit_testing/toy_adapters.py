"""Adapters in a few lines each: what an outside author writes first of a method."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from tunerkit.plugin import Adapter, BaseLayer, add_low_rank

SCALE = 0.5


class LowRank(Adapter):
    """Adds `SCALE` · ``b a x``; ``a`` (rank, in) is random, ``b`` (out, rank) starts at 0."""

    reads_output: ClassVar[bool | None] = False
    reads_weight: ClassVar[bool | None] = False

    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return add_low_rank(base, x, y, q=self.a, p=self.b, scale=SCALE)


class Shift(Adapter):
    """Adds a trained vector ``v`` (out,), which starts at 0."""

    reads_output: ClassVar[bool | None] = False
    reads_weight: ClassVar[bool | None] = False

    def __init__(self, base: BaseLayer) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.zeros(base.out_features))

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return y + base.shape_bias(self.v).to(y.dtype)
