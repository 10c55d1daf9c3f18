"""Toy methods that read what the base layer computes: one scales its output, one turns and stretches its weight."""

from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

import tunerkit
from tests.support.toys import OneMethod
from tunerkit.plugin import Adapter, AdapterConfig, BaseLayer, Delta, Method
from tunerkit_testing.toy_methods import LowRankConfig


class Scale(Adapter):
    """Multiplies the output by 1 + ``l`` (out,), as IA3 does; ``l`` starts at 0."""

    reads_output: ClassVar[bool | None] = True
    reads_weight: ClassVar[bool | None] = True

    def __init__(self, base: BaseLayer) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.zeros(base.out_features))

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return (y * base.shape_bias(1 + self.l)).to(y.dtype)


class Secretive(Scale):
    """A `Scale` whose class does not say what it reads."""

    reads_output: ClassVar[bool | None] = None
    reads_weight: ClassVar[bool | None] = None


class Direction(Adapter):
    """Trains the length ``m`` (out,) of each row of W, and its direction by a low-rank ``b a``, as DoRA does."""

    reads_output = True
    reads_weight = True

    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))
        self.m = nn.Parameter(torch.linalg.vector_norm(base.dense().float(), dim=1))

    @property
    def rank(self) -> int:
        return len(self.a)

    def stretch(self, base: BaseLayer) -> Tensor:
        """Return the factor of each row of W + ``b a``, (out,)."""
        lengths: Tensor = torch.linalg.vector_norm(base.dense() + self.b @ self.a, dim=1)
        return self.m / lengths

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        bias, stretch = base.bias(), base.shape_bias(self.stretch(base))
        wide = x.to(self.a.dtype) if x.is_floating_point() else x
        product = base.project_out(base.project_in(wide, self.a), self.b)
        linear = y if bias is None else y - base.shape_bias(bias)
        return (y + (stretch - 1) * linear + stretch * product).to(y.dtype)


@attrs.frozen
class ScaleConfig(AdapterConfig):
    """Only the settings of every method."""


class ScalePlugin(OneMethod):
    """``toy-scale``."""

    method = Method("toy-scale", config=ScaleConfig)

    @tunerkit.hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer) -> Scale:
        return Scale(base)

    @tunerkit.hookimpl
    def tunerkit_delta(self, adapter: Scale, base: BaseLayer) -> Delta:
        bias = base.bias()
        scaled = None if bias is None else adapter.l * bias
        return Delta(weight=adapter.l[:, None] * base.dense(), bias=scaled)


class SecretivePlugin(ScalePlugin):
    """``toy-secretive``."""

    method = Method("toy-secretive", config=ScaleConfig)

    @tunerkit.hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer) -> Scale:
        return Secretive(base)


class DirectionPlugin(OneMethod):
    """``toy-direction``."""

    method = Method("toy-direction", config=LowRankConfig)

    @tunerkit.hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer, config: LowRankConfig) -> Direction:
        return Direction(base, config.rank)

    @tunerkit.hookimpl
    def tunerkit_delta(self, adapter: Direction, base: BaseLayer) -> Delta:
        turned = base.dense() + adapter.b @ adapter.a
        return Delta(weight=adapter.stretch(base)[:, None] * turned - base.dense())
