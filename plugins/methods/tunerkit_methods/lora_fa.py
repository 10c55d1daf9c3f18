"""LoRA-FA (Zhang et al., 2023, arXiv 2308.03303): LoRA with a fixed A; B follows the gradient of W."""

import math
from collections.abc import Iterator
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

from tunerkit.plugin import (
    Adapter,
    AdapterConfig,
    BaseLayer,
    Factors,
    Method,
    Tuner,
    hookimpl,
    low_rank_factors,
    setting,
)
from tunerkit_methods.sizes import at_most


@attrs.frozen
class Config(AdapterConfig):
    """The settings of LoRA-FA."""

    rank: int = setting(8, ge=1, doc="rows of A and columns of B", aka=("r",))
    alpha: float = setting(16.0, gt=0, doc="numerator of the scale alpha / rank", aka=("lora_alpha",))
    dropout: float = setting(0.0, ge=0, lt=1, doc="share of the input that is dropped", aka=("lora_dropout",))


class HalfFixed(Adapter):
    """Adds s B A x, with s = alpha / rank, a fixed ``a`` (r, in) and a trained ``b`` (out, r), which starts at 0."""

    reads_output: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = False

    def __init__(self, base: BaseLayer, config: Config) -> None:
        super().__init__()
        most = max(8, min(base.out_features, base.in_features))  # 8, the default, does no harm
        rank = at_most(config.rank, 8, most, "rank, the rank of the weight")
        start = nn.init.kaiming_uniform_(torch.empty(rank, base.in_features), a=math.sqrt(5))
        self.a = nn.Parameter(start, requires_grad=False)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))
        self.scale, self.dropout = config.alpha / rank, config.dropout

    @property
    def rank(self) -> int:
        return len(self.a)

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        # Not add_low_rank, which keeps x for the gradient of A. This keeps A x alone.
        x = x.to(self.a.device, self.a.dtype if x.is_floating_point() else x.dtype)
        h = base.project_in(x, self.a, self.dropout if self.training else 0.0)
        return torch.add(y, base.project_out(h, self.b).to(y.device, y.dtype), alpha=self.scale)


@hookimpl
def tunerkit_methods() -> Iterator[Method]:
    yield Method("lora-fa", config=Config, needs_steps=True)


@hookimpl
def tunerkit_build_adapter(base: BaseLayer, config: Config) -> HalfFixed:
    return HalfFixed(base, config)


@hookimpl
def tunerkit_factors(adapter: HalfFixed) -> Factors:
    return low_rank_factors(adapter.a, adapter.b, scale=adapter.scale)


@hookimpl
def tunerkit_before_step(tuner: Tuner) -> None:
    """Replace the gradient g of B by g (A Aᵀ)⁻¹ / s²: with it, s B A moves as close to the gradient of W as it can."""
    for adapter in tuner.adapters().values():
        assert isinstance(adapter, HalfFixed)
        if adapter.b.grad is not None:
            wide = torch.promote_types(adapter.a.dtype, torch.float32)
            a, grad = adapter.a.to(wide), adapter.b.grad.to(wide)
            # Rows of A can depend on each other, where there are more than the layer has features.
            gram = a @ a.T + 1e-8 * torch.eye(len(a), dtype=wide, device=a.device)
            adapter.b.grad.copy_(torch.linalg.solve(gram, grad, left=False) / adapter.scale**2)
