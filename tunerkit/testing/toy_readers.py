"""Toy methods that read what the base layer computes: one scales its output, one turns and stretches its weight."""

import attrs
import torch
from torch import Tensor, nn

import tunerkit
from tunerkit.testing.toy_methods import LowRankConfig


@attrs.frozen
class ScaleConfig(tunerkit.AdapterConfig):
    """Only the settings of every method."""


class Scale(tunerkit.Adapter):
    """Multiplies the output by 1 + ``l`` (out,), as IA3 does; ``l`` starts at 0."""

    reads_output = True
    reads_weight = True

    def __init__(self, base: tunerkit.BaseLayer) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.zeros(base.out_features))

    def forward(self, base: tunerkit.BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return (y + y * base.shape_bias(self.l)).to(y.dtype)


class ScalePlugin:
    """``toy-scale``."""

    @tunerkit.hookimpl
    def tunerkit_methods(self) -> list[tunerkit.Method]:
        return [tunerkit.Method("toy-scale", config=ScaleConfig)]

    @tunerkit.hookimpl
    def tunerkit_build_adapter(self, base: tunerkit.BaseLayer) -> Scale:
        return Scale(base)

    @tunerkit.hookimpl
    def tunerkit_delta(self, adapter: Scale, base: tunerkit.BaseLayer) -> tunerkit.Delta:
        bias = base.bias()
        scaled = None if bias is None else adapter.l * bias
        return tunerkit.Delta(weight=adapter.l[:, None] * base.dense(), bias=scaled)


class Secretive(Scale):
    """A `Scale` whose class does not say what it reads."""

    reads_output = None
    reads_weight = None


class SecretivePlugin(ScalePlugin):
    """``toy-secretive``."""

    @tunerkit.hookimpl
    def tunerkit_methods(self) -> list[tunerkit.Method]:
        return [tunerkit.Method("toy-secretive", config=ScaleConfig)]

    @tunerkit.hookimpl
    def tunerkit_build_adapter(self, base: tunerkit.BaseLayer) -> Scale:
        return Secretive(base)


class Direction(tunerkit.Adapter):
    """Trains the length ``m`` (out,) of each row of W, and its direction by a low-rank ``b a``, as DoRA does."""

    reads_output = True
    reads_weight = True

    def __init__(self, base: tunerkit.BaseLayer, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))
        self.m = nn.Parameter(base.dense().float().norm(dim=1))

    @property
    def rank(self) -> int:
        return len(self.a)

    def stretch(self, base: tunerkit.BaseLayer) -> Tensor:
        """Return the factor of each row of W + ``b a``, (out,)."""
        return self.m / (base.dense() + self.b @ self.a).norm(dim=1)

    def forward(self, base: tunerkit.BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        bias, stretch = base.bias(), base.shape_bias(self.stretch(base))
        wide = x.to(self.a.dtype) if x.is_floating_point() else x
        product = base.project_out(base.project_in(wide, self.a), self.b)
        linear = y if bias is None else y - base.shape_bias(bias)
        return (y + (stretch - 1) * linear + stretch * product).to(y.dtype)


class DirectionPlugin:
    """``toy-direction``."""

    @tunerkit.hookimpl
    def tunerkit_methods(self) -> list[tunerkit.Method]:
        return [tunerkit.Method("toy-direction", config=LowRankConfig)]

    @tunerkit.hookimpl
    def tunerkit_build_adapter(self, base: tunerkit.BaseLayer, config: LowRankConfig) -> Direction:
        return Direction(base, config.rank)

    @tunerkit.hookimpl
    def tunerkit_delta(self, adapter: Direction, base: tunerkit.BaseLayer) -> tunerkit.Delta:
        turned = base.dense() + adapter.b @ adapter.a
        return tunerkit.Delta(weight=adapter.stretch(base)[:, None] * turned - base.dense())
