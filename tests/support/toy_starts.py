"""Toy methods with a start of their own: two that are fitted to data, and one whose delta does not start at 0."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import tunerkit
from tests.support.toys import OneMethod
from tunerkit.plugin import (
    Adapter,
    BaseLayer,
    Factors,
    Method,
    Statistics,
    StatisticsRequest,
    Tuner,
    add_low_rank,
    low_rank_factors,
    resize_,
)
from tunerkit_testing.toy_adapters import LowRank
from tunerkit_testing.toy_methods import LowRankConfig, LowRankPlugin

# The rank of what is measured of the data; toy adapters have smaller ones.
MEASURED = 4


class Principal(Adapter):
    """Trains the main part ``b a`` of W, as PiSSA does, and takes away its start, a fixed twin ``start_b start_a``."""

    reads_output = False
    reads_weight = True  # at its start

    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__()
        u, sigma, vh = torch.linalg.svd(base.dense().float(), full_matrices=False)
        self.a, self.b = nn.Parameter(vh[:rank]), nn.Parameter(u[:, :rank] * sigma[:rank])
        self.start_a = nn.Parameter(self.a.detach().clone(), requires_grad=False)
        self.start_b = nn.Parameter(self.b.detach().clone(), requires_grad=False)

    @property
    def rank(self) -> int:
        return len(self.a)

    def difference(self) -> tuple[Tensor, Tensor]:
        """Return the difference to the start as one product: Q (2 r, in) and P (out, 2 r)."""
        return torch.cat([self.a, self.start_a]), torch.cat([self.b, -self.start_b], dim=1)

    def factors(self) -> Factors:
        """Return the same as a record."""
        q, p = self.difference()
        return low_rank_factors(q, p, scale=1.0)

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        q, p = self.difference()
        return add_low_rank(base, x, y, q=q, p=p, scale=1.0)


class Fitted(LowRank):
    """A `LowRank` whose ``a`` is set from statistics of the data, to the directions that explain most of it."""

    reads_output = False
    reads_weight = False
    rank_dims: ClassVar[Mapping[str, int]] = {"a": 0, "b": 1}

    def fit_(self, measured: Tensor, share: float) -> None:
        """Span the main directions of the rows of ``measured``, (k, in): as many as have ``share`` of their energy."""
        _, sigma, directions = torch.linalg.svd(measured, full_matrices=False)
        explained = sigma.square().cumsum(0) / sigma.square().sum()
        rank = int((explained < share).sum()) + 1
        resize_(self.a, directions[:rank].to(self.a))
        resize_(self.b, self.b.new_zeros(len(self.b), rank))


class FittedPlugin(LowRankPlugin):
    """``toy-inputs``, fitted to the inputs as EVA is, and ``toy-gradients``, to the gradients as LoRA-GA is."""

    @tunerkit.hookimpl
    def tunerkit_methods(self) -> list[Method]:
        requests = {
            "toy-inputs": StatisticsRequest(inputs=MEASURED),
            "toy-gradients": StatisticsRequest(gradients=MEASURED),
        }
        return [Method(name, LowRankConfig, statistics=request) for name, request in requests.items()]

    @tunerkit.hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer, config: LowRankConfig) -> Fitted:
        return Fitted(base, config.rank)

    @tunerkit.hookimpl
    def tunerkit_calibrate(self, tuner: Tuner, statistics: Mapping[str, Statistics]) -> dict[str, int]:
        adapters: Mapping[str, Any] = tuner.adapters()
        for path, adapter in adapters.items():
            found = statistics[path]
            measured = found.inputs if found.gradients is None else found.gradients.p @ found.gradients.q
            adapter.fit_(measured, share=0.9)
        return tuner.ranks()


class PrincipalPlugin(OneMethod):
    """``toy-principal``."""

    method = Method("toy-principal", config=LowRankConfig, start="rounding")

    @tunerkit.hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer, config: LowRankConfig) -> Principal:
        return Principal(base, config.rank)

    @tunerkit.hookimpl
    def tunerkit_factors(self, adapter: Principal) -> Factors:
        return adapter.factors()
