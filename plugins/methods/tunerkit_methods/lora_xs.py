"""LoRA-XS (Bałazy et al., 2024, arXiv 2405.17604): a small trained matrix between fixed singular vectors of W."""

from collections.abc import Iterator

import attrs
import torch
from torch import Tensor, nn

from tunerkit.plugin import Adapter, AdapterConfig, BaseLayer, Factors, Method, add_low_rank, hookimpl, setting
from tunerkit_methods.sizes import at_most


@attrs.frozen
class Config(AdapterConfig):
    """The settings of LoRA-XS."""

    rank: int | None = setting(None, ge=1, doc="rank at each target; None means 32, or less if the layer is smaller")


class Small(Adapter):
    """Adds U S R Vᵀ x (equation 2): U (out, r), S and V are of the SVD of W; only R (r, r) is trained, from 0."""

    reads_output = False
    reads_weight = True  # at the start

    def __init__(self, base: BaseLayer, rank: int, *, loading: bool) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.zeros(base.out_features, rank), requires_grad=False)
        self.q = nn.Parameter(torch.zeros(rank, base.in_features), requires_grad=False)
        if not loading:
            u, s, vh = torch.linalg.svd(base.dense().float().cpu(), full_matrices=False)
            self.p.copy_(u[:, :rank] * s[:rank])
            self.q.copy_(vh[:rank])
        self.r = nn.Parameter(torch.zeros(rank, rank))

    @property
    def rank(self) -> int:
        return len(self.q)

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return add_low_rank(base, x, y, q=self.q, p=self.p @ self.r, scale=1.0)


@hookimpl
def tunerkit_methods() -> Iterator[Method]:
    yield Method("lora-xs", config=Config)


@hookimpl
def tunerkit_build_adapter(base: BaseLayer, config: Config, loading: bool) -> Small:
    limit = min(base.in_features, base.out_features)
    rank = at_most(config.rank, 32, limit, "rank, the smaller side of the layer")
    return Small(base, rank, loading=loading)


@hookimpl
def tunerkit_factors(adapter: Small) -> Factors:
    return Factors(q=adapter.q, p=adapter.p @ adapter.r)
