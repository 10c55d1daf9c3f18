"""The LoRA adapter: two low-rank matrices beside a base layer."""

import math

import torch
from torch import Tensor, nn

from tunerkit import Adapter, BaseLayer, add_low_rank


class LoraAdapter(Adapter):
    """Adds scale · b a x to the base layer's output, with ``a`` (r, in) and ``b`` (out, r)."""

    def __init__(self, base: BaseLayer, *, rank: int, scale: float, dropout: float, start: str) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))
        self.scale = scale
        self.dropout = dropout
        if start == "gaussian":
            nn.init.normal_(self.a, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return add_low_rank(base, x, y, q=self.a, p=self.b, scale=self.scale, dropout=dropout)
