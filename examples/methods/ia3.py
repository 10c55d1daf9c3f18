"""IA³ (Liu et al., 2022): one trained factor for each output of a layer."""

from collections.abc import Iterator
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

from tunerkit.plugin import Adapter, AdapterConfig, BaseLayer, Delta, Method, hookimpl


@attrs.frozen
class Config(AdapterConfig):
    """Only the settings of every method."""


class Scaling(Adapter):
    """Multiplies the output by ``l`` (out,), which starts at 1."""

    reads_output: ClassVar[bool] = True
    reads_weight: ClassVar[bool] = True

    def __init__(self, base: BaseLayer) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.ones(base.out_features))

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return (y * base.shape_bias(self.l)).to(y.dtype)


@hookimpl
def tunerkit_methods() -> Iterator[Method]:
    yield Method("ia3", config=Config)


@hookimpl
def tunerkit_build_adapter(base: BaseLayer) -> Scaling:
    return Scaling(base)


@hookimpl
def tunerkit_delta(adapter: Scaling, base: BaseLayer) -> Delta:
    change, bias = adapter.l - 1, base.bias()
    return Delta(weight=change[:, None] * base.dense(), bias=None if bias is None else change * bias)
