"""LoRA+ (Hayou et al., 2024): LoRA whose B learns 16 times as fast as A."""

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
    ParamGroup,
    Tuner,
    add_low_rank,
    hookimpl,
    setting,
)


@attrs.frozen
class Config(AdapterConfig):
    """The settings of LoRA+."""

    rank: int = setting(8, ge=1, doc="rank at each target")
    ratio: float = setting(16.0, gt=0, doc="B's learning rate, as a multiple of A's")


class LoraPlus(Adapter):
    """Adds 2 · B A x."""

    reads_output: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = False

    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return add_low_rank(base, x, y, q=self.a, p=self.b, scale=2.0)


@hookimpl
def tunerkit_methods() -> Iterator[Method]:
    yield Method("lora-plus", config=Config)


@hookimpl
def tunerkit_build_adapter(base: BaseLayer, config: Config) -> LoraPlus:
    return LoraPlus(base, config.rank)


@hookimpl
def tunerkit_factors(adapter: LoraPlus) -> Factors:
    return Factors(q=adapter.a, p=2.0 * adapter.b)


@hookimpl
def tunerkit_param_groups(tuner: Tuner) -> list[ParamGroup]:
    assert isinstance(tuner.config, Config)
    fast = [adapter.b for adapter in tuner.adapters().values() if isinstance(adapter, LoraPlus)]
    return [ParamGroup(fast, lr_scale=tuner.config.ratio)]
