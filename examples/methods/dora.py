"""DoRA (Liu et al., 2024): LoRA that trains the length of each row of W + ΔW apart from its direction."""

from collections.abc import Iterator
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

from tunerkit.plugin import Adapter, AdapterConfig, BaseLayer, Delta, Method, add_low_rank, hookimpl, setting


@attrs.frozen
class Config(AdapterConfig):
    """The settings of DoRA."""

    rank: int = setting(8, ge=1, doc="rank at each target")


class Dora(Adapter):
    """Replaces W by diag(m / ‖W + B A‖) (W + B A), with the norm of each row; ``m`` (out,) starts at ‖W‖."""

    reads_output: ClassVar[bool] = True
    reads_weight: ClassVar[bool] = True

    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))
        self.m = nn.Parameter(base.dense().float().norm(dim=1))

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def weights(self, base: BaseLayer) -> tuple[Tensor, Tensor]:
        """W + B A, (out, in), and the factor of each of its rows, (out,), which is 1 at the start."""
        summed = base.dense().to(self.m.dtype) + self.b @ self.a
        return summed, self.m / summed.norm(dim=1).clamp_min(1e-12)

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        _, factor = self.weights(base)
        bias = base.bias()
        without = y if bias is None else y - base.shape_bias(bias)
        low = add_low_rank(base, x, torch.zeros_like(y), q=self.a, p=self.b, scale=1.0)
        return y + (base.shape_bias(factor - 1) * without + base.shape_bias(factor) * low).to(y.dtype)


@hookimpl
def tunerkit_methods() -> Iterator[Method]:
    yield Method("dora", config=Config)


@hookimpl
def tunerkit_build_adapter(base: BaseLayer, config: Config) -> Dora:
    return Dora(base, config.rank)


@hookimpl
def tunerkit_delta(adapter: Dora, base: BaseLayer) -> Delta:
    summed, factor = adapter.weights(base)
    return Delta(weight=factor[:, None] * summed - base.dense())
