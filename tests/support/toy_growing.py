"""A toy method that grows its rank while it trains."""

from collections.abc import Mapping
from typing import Any, ClassVar

import attrs
import torch
from torch.optim import Optimizer

import tunerkit
from tests.support.toys import OneMethod
from tunerkit.plugin import (
    AdapterConfig,
    BaseLayer,
    Factors,
    Growth,
    Method,
    State,
    Tuner,
    low_rank_factors,
    optimizer_of,
    resize_obstacle,
    setting,
)
from tunerkit_testing.toy_adapters import SCALE, LowRank


@attrs.frozen
class GrowingConfig(AdapterConfig):
    """When all adapters get one more row of ``a``, and up to which rank."""

    every: int = setting(2, ge=1, doc="Steps between two growths.")
    max_rank: int = setting(4, ge=1, doc="The final rank.")


class Growing(LowRank):
    """A `LowRank` whose rank may change."""

    reads_output = False
    reads_weight = False
    rank_dims: ClassVar[Mapping[str, int]] = {"a": 0, "b": 1}

    def growths(self, generator: torch.Generator) -> list[Growth]:
        """Return one more row of ``a``, and one more column of ``b``, which is 0."""
        row = torch.randn(1, self.a.shape[1], generator=generator)
        return [
            Growth(self.a, 0, row),
            Growth(self.b, 1, self.b.new_zeros(len(self.b), 1)),
        ]


class GrowingPlugin(OneMethod):
    """``toy-growing``, which starts at rank 1; its state is the number of times that it has grown."""

    method = Method("toy-growing", config=GrowingConfig, needs_steps=True)

    @tunerkit.hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer) -> Growing:
        return Growing(base, 1)

    @tunerkit.hookimpl
    def tunerkit_factors(self, adapter: Growing) -> Factors:
        return low_rank_factors(adapter.a, adapter.b, scale=SCALE)

    @tunerkit.hookimpl
    def tunerkit_start(self, tuner: Tuner, optimizer: Optimizer | None) -> dict[str, int]:
        if reason := resize_obstacle(tuner.parameters(), optimizer):
            raise tunerkit.errors.StepError(f"toy-growing cannot grow here: {reason}")
        return {"grown": 0}

    @tunerkit.hookimpl
    def tunerkit_after_step(self, tuner: Any, step: int) -> dict[str, int] | None:
        if step % tuner.config.every or tuner.state["grown"] + 1 >= tuner.config.max_rank:
            return None
        tuner.state["grown"] += 1
        generator = torch.Generator().manual_seed(step)
        growths = [growth for adapter in tuner.adapters().values() for growth in adapter.growths(generator)]
        tunerkit.grow_(growths, optimizer_of(tuner))
        ranks: dict[str, int] = tuner.ranks()
        return ranks

    @tunerkit.hookimpl
    def tunerkit_state(self, tuner: Any) -> State:
        return State(tensors={}, values=tuner.state)

    @tunerkit.hookimpl
    def tunerkit_restore(self, tuner: Tuner, state: State) -> None:
        tuner.state = {"grown": state.values["grown"]}
