"""A toy method whose adapters share fixed random matrices, as VeRA's do."""

from collections.abc import Sequence

import tunerkit
from tests.support.toys import OneMethod
from tunerkit.plugin import BaseLayer, Factors, Method, low_rank_factors
from tunerkit_testing.toy_adapters import Matrices, Weighting
from tunerkit_testing.toy_methods import LowRankConfig


class SharedPlugin(OneMethod):
    """``toy-shared``."""

    method = Method("toy-shared", config=LowRankConfig)

    @tunerkit.hookimpl
    def tunerkit_shared(self, bases: Sequence[BaseLayer], config: LowRankConfig) -> Matrices:
        out, into = max(base.out_features for base in bases), max(base.in_features for base in bases)
        return Matrices(out, into, config.rank)

    @tunerkit.hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer, config: LowRankConfig) -> Weighting:
        return Weighting(base, config.rank)

    @tunerkit.hookimpl
    def tunerkit_factors(self, adapter: Weighting, base: BaseLayer) -> Factors:
        q, p = adapter.parts(base)
        return low_rank_factors(q, p, scale=1.0, lam=adapter.d)
