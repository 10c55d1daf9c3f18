"""A toy method whose adapters share fixed random matrices, as VeRA's do."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

import tunerkit
from tests.support.toys import OneMethod
from tunerkit.plugin import Adapter, BaseLayer, Factors, Method, add_low_rank, low_rank_factors
from tunerkit_testing.toy_methods import LowRankConfig


class Matrices(nn.Module):
    """Fixed random ``a`` (rank, in) and ``b`` (out, rank), as large as the largest target."""

    def __init__(self, out: int, into: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, into), requires_grad=False)
        self.b = nn.Parameter(torch.randn(out, rank), requires_grad=False)


class Weighting(Adapter):
    """Adds ``diag(v) b diag(d) a x`` with trained ``v`` (out,), which starts at 0, and ``d`` (rank,)."""

    reads_output = False
    reads_weight = False

    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.zeros(base.out_features))
        self.d = nn.Parameter(torch.ones(rank))

    @property
    def rank(self) -> int:
        return len(self.d)

    def parts(self, base: BaseLayer) -> tuple[Tensor, Tensor]:
        """Return the target's part of ``a``, (rank, in), and ``diag(v) b``, (out, rank)."""
        shared = cast(Matrices, self.shared)
        return shared.a[:, : base.in_features], self.v[:, None] * shared.b[: base.out_features]

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        q, p = self.parts(base)
        return add_low_rank(base, x, y, q=q, p=p, lam=self.d, scale=1.0)


class SharedPlugin(OneMethod):
    """``toy-shared``."""

    method = Method("toy-shared", config=LowRankConfig)

    @tunerkit.hookimpl
    def tunerkit_shared(self, bases: Sequence[BaseLayer], config: LowRankConfig) -> Matrices:
        out, into = max(base.out_features for base in bases), max(base.in_features for base in bases)
        return Matrices(out, into, config.rank)

    @tunerkit.hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer, config: LowRankConfig) -> Weighting:
        return Weighting(base, config.rank)

    @tunerkit.hookimpl
    def tunerkit_factors(self, adapter: Weighting, base: BaseLayer) -> Factors:
        q, p = adapter.parts(base)
        return low_rank_factors(q, p, scale=1.0, lam=adapter.d)
