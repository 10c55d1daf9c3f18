"""LoHa (Hyeon-Woo et al., 2022): the product, entry by entry, of two low-rank matrices."""

from collections.abc import Iterator
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

from tunerkit.plugin import Adapter, AdapterConfig, BaseLayer, Delta, Method, add_low_rank, hookimpl, setting


@attrs.frozen
class Config(AdapterConfig):
    """The settings of LoHa."""

    rank: int = setting(4, ge=1, doc="rank of both matrices; their product may have its square")


class Loha(Adapter):
    """Adds ((B₁ A₁) ∘ (B₂ A₂)) x; B₂ starts at 0."""

    reads_output: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = False

    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__()
        self.a1 = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.a2 = nn.Parameter(torch.randn(rank, base.in_features))
        self.b1 = nn.Parameter(torch.randn(base.out_features, rank) / rank**0.5)
        self.b2 = nn.Parameter(torch.zeros(base.out_features, rank))

    def matrix(self) -> Tensor:
        return (self.b1 @ self.a1) * (self.b2 @ self.a2)

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        matrix = self.matrix()
        return add_low_rank(base, x, y, q=matrix, p=torch.eye(base.out_features).to(matrix), scale=1.0)


@hookimpl
def tunerkit_methods() -> Iterator[Method]:
    yield Method("loha", config=Config)


@hookimpl
def tunerkit_build_adapter(base: BaseLayer, config: Config) -> Loha:
    return Loha(base, config.rank)


@hookimpl
def tunerkit_delta(adapter: Loha) -> Delta:
    return Delta(weight=adapter.matrix())
