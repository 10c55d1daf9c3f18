"""EVA (Paischer et al., 2024): LoRA whose A starts at the main directions of the layer's inputs."""

from collections.abc import Iterator, Mapping
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
    Statistics,
    StatisticsRequest,
    Tuner,
    add_low_rank,
    hookimpl,
    setting,
)


@attrs.frozen
class Config(AdapterConfig):
    """The settings of EVA."""

    rank: int = setting(8, ge=1, doc="rank at each target")


class Eva(Adapter):
    """Adds 2 · B A x. ``tunerkit.calibrate`` sets A; without it, A is random."""

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
    yield Method("eva", config=Config, statistics=StatisticsRequest(inputs=32))


@hookimpl
def tunerkit_build_adapter(base: BaseLayer, config: Config) -> Eva:
    return Eva(base, config.rank)


@hookimpl
def tunerkit_factors(adapter: Eva) -> Factors:
    return Factors(q=adapter.a, p=2.0 * adapter.b)


@hookimpl
def tunerkit_calibrate(tuner: Tuner, statistics: Mapping[str, Statistics]) -> None:
    for path, adapter in tuner.adapters().items():
        assert isinstance(adapter, Eva)
        inputs = statistics[path].inputs
        assert inputs is not None  # it was asked for
        main = torch.linalg.svd(inputs, full_matrices=False).Vh[: adapter.rank]
        adapter.a[: len(main)].copy_(main)  # a layer may have fewer features than the rank
