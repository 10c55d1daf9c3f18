"""LoRA-XS (Bałazy et al., 2024): a trained (r, r) matrix between the singular vectors of W, which are fixed."""

from collections.abc import Iterator
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

from tunerkit.plugin import Adapter, AdapterConfig, BaseLayer, Factors, Method, add_low_rank, hookimpl, setting


@attrs.frozen
class Config(AdapterConfig):
    """The settings of LoRA-XS."""

    rank: int = setting(8, ge=1, doc="rank at each target")


class Small(Adapter):
    """Adds U S R Vᵀ x; only ``r`` (r, r) is trained, and starts at 0."""

    reads_output: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = True  # at the start

    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__()
        u, s, vh = torch.linalg.svd(base.dense().float().cpu(), full_matrices=False)
        self.p = nn.Parameter(u[:, :rank] * s[:rank], requires_grad=False)
        self.q = nn.Parameter(vh[:rank].clone(), requires_grad=False)
        self.r = nn.Parameter(torch.zeros(len(self.q), len(self.q)))

    @property
    def rank(self) -> int:
        return len(self.q)

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return add_low_rank(base, x, y, q=self.q, p=self.p @ self.r, scale=1.0)


@hookimpl
def tunerkit_methods() -> Iterator[Method]:
    yield Method("lora-xs", config=Config)


@hookimpl
def tunerkit_build_adapter(base: BaseLayer, config: Config) -> Small:
    return Small(base, config.rank)


@hookimpl
def tunerkit_factors(adapter: Small) -> Factors:
    return Factors(q=adapter.q, p=adapter.p @ adapter.r)
