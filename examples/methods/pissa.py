"""PiSSA (Meng et al., 2024): factors that start as the largest singular triplets of W."""

from collections.abc import Iterator
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

from tunerkit.plugin import Adapter, AdapterConfig, BaseLayer, Factors, Method, add_low_rank, hookimpl, setting


@attrs.frozen
class Config(AdapterConfig):
    """The settings of PiSSA."""

    rank: int = setting(8, ge=1, doc="rank at each target")


class Principal(Adapter):
    """Adds P Q x − P₀ Q₀ x, where P₀ Q₀ is the start, so that the base stays as it is."""

    reads_output: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = False

    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__()
        u, s, vh = torch.linalg.svd(base.dense().float().cpu(), full_matrices=False)
        root = s[:rank].sqrt()
        self.p, self.q = nn.Parameter(u[:, :rank] * root), nn.Parameter(root[:, None] * vh[:rank])
        self.p_start = nn.Parameter(self.p.detach().clone(), requires_grad=False)
        self.q_start = nn.Parameter(self.q.detach().clone(), requires_grad=False)

    @property
    def rank(self) -> int:
        return self.q.shape[0]

    def product(self) -> Factors:
        return Factors(q=torch.cat([self.q, self.q_start]), p=torch.cat([self.p, -self.p_start], dim=1))

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        product = self.product()
        return add_low_rank(base, x, y, q=product.q, p=product.p, scale=1.0)


@hookimpl
def tunerkit_methods() -> Iterator[Method]:
    yield Method("pissa", config=Config, start="rounding")


@hookimpl
def tunerkit_build_adapter(base: BaseLayer, config: Config) -> Principal:
    return Principal(base, config.rank)


@hookimpl
def tunerkit_factors(adapter: Principal) -> Factors:
    return adapter.product()
