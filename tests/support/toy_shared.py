"""A toy method whose adapters share fixed random matrices, as VeRA's do."""

from collections.abc import Sequence

import tunerkit
from tunerkit_testing.toy_adapters import Matrices, Weighting
from tunerkit_testing.toy_methods import LowRankConfig


class SharedPlugin:
    """``toy-shared``."""

    @tunerkit.hookimpl
    def tunerkit_methods(self) -> list[tunerkit.Method]:
        return [tunerkit.Method("toy-shared", config=LowRankConfig)]

    @tunerkit.hookimpl
    def tunerkit_shared(self, bases: Sequence[tunerkit.BaseLayer], config: LowRankConfig) -> Matrices:
        out, into = max(base.out_features for base in bases), max(base.in_features for base in bases)
        return Matrices(out, into, config.rank)

    @tunerkit.hookimpl
    def tunerkit_build_adapter(self, base: tunerkit.BaseLayer, config: LowRankConfig) -> Weighting:
        return Weighting(base, config.rank)

    @tunerkit.hookimpl
    def tunerkit_factors(self, adapter: Weighting, base: tunerkit.BaseLayer) -> tunerkit.Factors:
        q, p = adapter.parts(base)
        return tunerkit.low_rank_factors(q, p, scale=1.0, lam=adapter.d)
