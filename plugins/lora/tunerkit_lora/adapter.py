"""The LoRA adapter: two low-rank matrices beside a base layer."""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from tunerkit.plugin import Adapter, BaseLayer, Factors, add_low_rank, low_rank_factors


class LoraAdapter(Adapter):
    """Adds scale · b a x to the base layer's output, with ``a`` (r, in) and ``b`` (out, r).

    For a ``stack`` of E matrices, each has its own: ``a`` (E, r, in) and ``b`` (E, out, r).
    """

    reads_output: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = False

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        rank: int,
        scale: float,
        dropout: float,
        start: str,
        stack: int = 0,
    ) -> None:
        super().__init__()
        first = (stack,) if stack else ()
        self.a = nn.Parameter(torch.empty(*first, rank, in_features))
        self.b = nn.Parameter(torch.zeros(*first, out_features, rank))
        self.scale, self._rank = scale, rank
        self.dropout = dropout
        if rank == 0:
            return
        if start == "gaussian":
            nn.init.normal_(self.a, std=1 / rank)
        else:
            for one in self.a.detach().view(-1, rank, in_features):  # torch would take a stack for a convolution
                nn.init.kaiming_uniform_(one, a=math.sqrt(5))

    @property
    def rank(self) -> int:
        return self._rank if self.a.ndim < 2 else self.a.shape[-2]  # ZeRO-3 empties A between uses

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return add_low_rank(base, x, y, q=self.a, p=self.b, scale=self.scale, dropout=dropout)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}" + (f", dropout={self.dropout}" if self.dropout else "")

    @torch.no_grad()
    def set_(self, product: Factors) -> None:
        """Set A to ``product.q`` (r, in) and B to ``product.p`` (out, r), or those of a stack."""
        self.a.copy_(product.q)
        self.b.copy_(product.p)

    def factors(self) -> Factors:
        """Return ΔW as low-rank factors."""
        return low_rank_factors(self.a, self.b, scale=self.scale)


class MovedLora(LoraAdapter):
    """A `LoraAdapter` whose rank `tunerkit.calibrate` may change."""

    rank_dims: ClassVar[Mapping[str, int]] = {"a": -2, "b": -1}
    rank = Adapter.rank  # which reads rank_dims, also where A is emptied


def adapter_of(product: Factors, *, scale: float) -> LoraAdapter:
    """Build the adapter whose ΔW is ``product``: q (r, in), p (out, r), or those of a stack."""
    adapter = LoraAdapter(
        in_features=product.q.shape[-1],
        out_features=product.p.shape[-2],
        stack=len(product.q) if product.q.ndim == 3 else 0,
        rank=product.rank,
        scale=scale,
        dropout=0.0,
        start="kaiming",
    )
    adapter.set_(Factors(q=product.q, p=product.p / scale))
    return adapter
