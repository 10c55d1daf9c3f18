"""Toy methods that read what the base layer computes: one scales its output, one turns and stretches its weight."""

import attrs

import tunerkit
from tests.support.toys import OneMethod
from tunerkit.plugin import AdapterConfig, BaseLayer, Delta, Method
from tunerkit_testing.toy_adapters import Direction, Scale, Secretive
from tunerkit_testing.toy_methods import LowRankConfig


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
