"""The adapter whose initial A and B are subtracted: ΔW = scale · (B A − B₀ A₀)."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from tunerkit.plugin import Adapter, BaseLayer, Factors, add_low_rank, low_rank_factors, resize_


class SubtractedLora(Adapter):
    """``a`` (r, in) and ``b`` (out, r) are trained; ``a_start`` and ``b_start`` are their initial values.

    B A − B₀ A₀ is computed as (B − B₀) A + B₀ (A − A₀), of rank 2r: it is exactly 0 at the start, and has the gradients
    of B A. So the base is not changed, and W − B₀ A₀ need not be stored.

    Before `set_start_`, A and B are 0, to be replaced by a file's values.
    """

    reads_output: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = True  # for its initial values

    def __init__(self, *, in_features: int, out_features: int, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(rank, in_features))
        self.b = nn.Parameter(torch.zeros(out_features, rank))
        self.a_start = nn.Parameter(torch.zeros(rank, in_features), requires_grad=False)
        self.b_start = nn.Parameter(torch.zeros(out_features, rank), requires_grad=False)
        self.scale = scale
        self.dropout = dropout

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def set_start_(self, start: Factors) -> None:
        """Initialize A to ``start.q`` (r, in) and B to ``start.p`` (out, r), of any rank."""
        for name, values in (("a", start.q), ("a_start", start.q), ("b", start.p), ("b_start", start.p)):
            parameter = self.get_parameter(name)
            resize_(parameter, values.to(parameter))

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        product = self._product()
        return add_low_rank(base, x, y, q=product.q, p=product.p, scale=self.scale, dropout=dropout)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}" + (f", dropout={self.dropout}" if self.dropout else "")

    def factors(self) -> Factors:
        """Return ΔW as low-rank factors, of rank 2r."""
        product = self._product()
        return low_rank_factors(product.q, product.p, scale=self.scale)

    def _product(self) -> Factors:
        q = torch.cat([self.a, self.a - self.a_start])
        return Factors(q=q, p=torch.cat([self.b - self.b_start, self.b_start], dim=1))


class MovedSubtracted(SubtractedLora):
    """A `SubtractedLora` whose rank `tunerkit.calibrate` may change."""

    rank_dims: ClassVar[Mapping[str, int]] = {"a": 0, "b": 1, "a_start": 0, "b_start": 1}
