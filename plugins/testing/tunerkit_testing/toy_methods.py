"""Toy methods: plugins of a few lines that a test registers in its own process."""

import attrs
import torch

import tunerkit
from tunerkit.plugin import AdapterConfig, BaseLayer, Delta, Method, State, Tuner, low_rank_delta, setting
from tunerkit_testing.toy_adapters import SCALE, LowRank, Shift


@attrs.frozen
class LowRankConfig(AdapterConfig):
    """A rank, so that two configs can give adapters of two shapes."""

    rank: int = setting(2, ge=1, doc="Rows of a.")


@attrs.frozen
class ShiftConfig(AdapterConfig):
    """Only the settings of every method."""


class LowRankPlugin:
    """``toy-low-rank``, which is LoRA in a few lines: it has a weight delta and implements no step hook."""

    @tunerkit.hookimpl
    def tunerkit_methods(self) -> list[Method]:
        return [Method("toy-low-rank", config=LowRankConfig)]

    @tunerkit.hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer, config: LowRankConfig) -> LowRank:
        return LowRank(base, config.rank)

    @tunerkit.hookimpl
    def tunerkit_delta(self, adapter: LowRank, base: BaseLayer) -> Delta:
        return Delta(weight=low_rank_delta(base, q=adapter.a, p=adapter.b, scale=SCALE))


class DeclaredPlugin(LowRankPlugin):
    """``toy-declared``: the same under a name of its own."""

    @tunerkit.hookimpl
    def tunerkit_methods(self) -> list[Method]:
        return [Method("toy-declared", config=LowRankConfig)]


class Shifting:
    """Abstract. What the plugins share whose methods add a `Shift`; each says itself which methods these are."""

    @tunerkit.hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer) -> Shift:
        return Shift(base)

    @tunerkit.hookimpl
    def tunerkit_delta(self, adapter: Shift) -> Delta:
        return Delta(bias=adapter.v)


class ShiftPlugin(Shifting):
    """``toy-shift``, and ``toy-stepper``, which needs steps: both have a bias delta and a training state.

    The state is the number of steps. A restored one is left in ``tuner.state`` as ``(seen, steps)``.
    """

    @tunerkit.hookimpl
    def tunerkit_methods(self) -> list[Method]:
        return [
            Method("toy-shift", config=ShiftConfig),
            Method("toy-stepper", config=ShiftConfig, needs_steps=True),
        ]

    @tunerkit.hookimpl
    def tunerkit_after_step(self) -> None:
        """Do nothing: a method that implements a step hook is one whose steps matter."""

    @tunerkit.hookimpl
    def tunerkit_state(self, tuner: Tuner) -> State:
        return State(tensors={"seen": torch.tensor([tuner.steps])}, values={"steps": tuner.steps})

    @tunerkit.hookimpl
    def tunerkit_restore(self, tuner: Tuner, state: State) -> None:
        tuner.state = (state.tensors["seen"], state.values["steps"])
