"""Plugins with one mistake each; `tests.support.mistakes` says which check must name it."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tunerkit.plugin import Adapter, BaseLayer, Delta, Method, State, Target, Tuner, hookimpl
from tunerkit_testing import Case, small
from tunerkit_testing.toy_methods import LowRankConfig

METHOD = "bad"


def square() -> nn.Module:
    """Three linear layers, of which two are square: a transposed delta fits."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    """The output for the small batch."""
    found: Tensor = model(small.X.clone())
    return found


CASE = Case("square", square, output, small.loss_of, {"targets": ("0", "2"), "train_modules": ("4",)})


class Product(Adapter):
    """Adds ``b a x``; what a mistake is made in."""

    reads_output: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = False

    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def added(self, x: Tensor) -> Tensor:
        """What forward adds, in the dtype of the parameters."""
        return x.to(self.a.dtype) @ self.a.T @ self.b.T

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return y + self.added(x).to(y.dtype)


class Plugin:
    """The method ``bad`` without a mistake: it passes every check."""

    adapter: type[Product] = Product

    @hookimpl
    def tunerkit_methods(self) -> list[Method]:
        return [Method(METHOD, config=LowRankConfig)]

    @hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer, config: LowRankConfig) -> Adapter:
        return self.adapter(base, config.rank)

    @hookimpl
    def tunerkit_delta(self, adapter: Product) -> Delta:
        return Delta(weight=adapter.b @ adapter.a)


# --- The base ---------------------------------------------------------------------------------------------------------


class ChangesAtBuild(Plugin):
    @hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer, config: LowRankConfig) -> Adapter:
        base.module.get_parameter("weight").data.mul_(0.9)
        return Product(base, config.rank)


class WritesTheBase(Product):
    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        base.module.get_parameter("weight").data.mul_(0.999)
        return super().forward(base, x, y)


class ChangesInForward(Plugin):
    adapter = WritesTheBase


class ChangesAfterAStep(Plugin):
    @hookimpl
    def tunerkit_after_step(self, tuner: Tuner) -> None:
        for target in tuner.targets:
            target.module.get_parameter("weight").data.mul_(0.999)


# --- The start --------------------------------------------------------------------------------------------------------


class StartsFarOff(Product):
    shift = 2e-3

    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        nn.init.constant_(self.b, self.shift)


class StartsAFarOff(Plugin):
    adapter = StartsFarOff


class StartsCloseBy(StartsFarOff):
    shift = 2e-7


class StartsACloseBy(Plugin):
    adapter = StartsCloseBy


# --- Training ---------------------------------------------------------------------------------------------------------


class Fixed(Product):
    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        self.requires_grad_(False)


class TrainsNothingFixed(Plugin):
    adapter = Fixed


class Detached(Product):
    def added(self, x: Tensor) -> Tensor:
        return super().added(x).detach()


class TrainsNothingDetached(Plugin):
    adapter = Detached


class AllZero(Product):
    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        nn.init.zeros_(self.a)


class TrainsNothingZero(Plugin):
    adapter = AllZero


class HalfDetached(Product):
    def added(self, x: Tensor) -> Tensor:
        return x.to(self.a.dtype) @ self.a.detach().T @ self.b.T


class TrainsHalf(Plugin):
    adapter = HalfDetached


class HalfOfTheGradient(Product):
    def added(self, x: Tensor) -> Tensor:
        h = super().added(x)
        return 0.5 * h + 0.5 * h.detach()


class GradientHalved(Plugin):
    adapter = HalfOfTheGradient


class CutsTheInput(Product):
    def added(self, x: Tensor) -> Tensor:
        return super().added(x.detach())


class InputDetached(Plugin):
    adapter = CutsTheInput


class LessInTraining(Product):
    def added(self, x: Tensor) -> Tensor:
        return super().added(x) * (0.9 if self.training else 1.0)


class ScaledInTraining(Plugin):
    adapter = LessInTraining


class Amplified(Product):
    trains_the_gain = True

    def added(self, x: Tensor) -> Tensor:
        gain = self.shared.get_parameter("gain")
        return super().added(x) * (gain if self.trains_the_gain else gain.detach())


class TrainsTheGainOnce:
    """Adapters share a trained factor, to which the second target gives no gradient."""

    @hookimpl
    def tunerkit_methods(self) -> list[Method]:
        return [Method(METHOD, config=LowRankConfig)]

    @hookimpl
    def tunerkit_shared(self) -> nn.Module:
        shared = nn.Module()
        shared.gain = nn.Parameter(torch.ones(()))
        return shared

    @hookimpl
    def tunerkit_build_adapter(self, target: Target, base: BaseLayer, config: LowRankConfig) -> Adapter:
        adapter = Amplified(base, config.rank)
        adapter.trains_the_gain = target.path != "2"
        return adapter

    @hookimpl
    def tunerkit_delta(self, adapter: Product) -> Delta:
        return Delta(weight=adapter.b @ adapter.a * adapter.shared.get_parameter("gain"))


# --- What it says of itself -------------------------------------------------------------------------------------------


class Modest(Product):
    @property
    def rank(self) -> int:
        return 1


class RankLies(Plugin):
    adapter = Modest


class DeltaTooSmall(Plugin):
    @hookimpl
    def tunerkit_delta(self, adapter: Product) -> Delta:
        return Delta(weight=0.999 * adapter.b @ adapter.a)


class DeltaHalfDetached(Plugin):
    @hookimpl
    def tunerkit_delta(self, adapter: Product) -> Delta:
        return Delta(weight=adapter.b @ adapter.a.detach())


class DeltaTransposed(Plugin):
    @hookimpl
    def tunerkit_delta(self, adapter: Product) -> Delta:
        return Delta(weight=(adapter.b @ adapter.a).T)


class DeltaMissing:
    @hookimpl
    def tunerkit_methods(self) -> list[Method]:
        return [Method(METHOD, config=LowRankConfig)]

    @hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer, config: LowRankConfig) -> Adapter:
        return Product(base, config.rank)


# --- Forward ----------------------------------------------------------------------------------------------------------


class Counting(Product):
    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        self.calls = 0

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return y + self.added(x).to(y.dtype) * (1 + 0.01 * self.calls)


class HiddenState(Plugin):
    adapter = Counting


class Scribbling(Product):
    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(base, x.data.mul_(0.5), y)


class WritesX(Plugin):
    adapter = Scribbling


class Widening(Product):
    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return y + self.added(x)


class WrongDtype(Plugin):
    adapter = Widening


class HoldsALambda(Product):
    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        self.activation: Callable[[Tensor], Tensor] = lambda h: h


class NotPicklable(Plugin):
    adapter = HoldsALambda


# --- Steps ------------------------------------------------------------------------------------------------------------


class NeedsSteps(Plugin):
    """The method ``bad`` with the declaration that its hooks must be called."""

    @hookimpl
    def tunerkit_methods(self) -> list[Method]:
        return [Method(METHOD, config=LowRankConfig, needs_steps=True)]


def own(tuner: Tuner) -> list[nn.Parameter]:
    """The parameters of the adapters, without those of modules that are trained in full."""
    return [parameter for adapter in tuner.adapters().values() for parameter in adapter.parameters()]


class IgnoresGradScale(NeedsSteps):
    @hookimpl
    def tunerkit_before_step(self, tuner: Tuner) -> None:
        for parameter in own(tuner):
            if parameter.grad is not None:
                parameter.grad += 0.1 * parameter.detach()


class StateNotSaved(NeedsSteps):
    """Keeps an average of the weights, towards which each step pulls them, and does not save it."""

    @hookimpl
    def tunerkit_start(self, tuner: Tuner) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in own(tuner)]

    @hookimpl
    def tunerkit_after_step(self, tuner: Tuner) -> None:
        averages: Any = tuner.state
        for average, parameter in zip(averages, own(tuner), strict=True):
            average.lerp_(parameter.detach(), 0.1)
            parameter.lerp_(average, 0.01)


class StateSaved(StateNotSaved):
    """The same without the mistake."""

    @hookimpl
    def tunerkit_state(self, tuner: Tuner) -> State:
        averages: Any = tuner.state
        return State(tensors={str(number): average for number, average in enumerate(averages)}, values={})

    @hookimpl
    def tunerkit_restore(self, tuner: Tuner, state: State) -> None:
        tuner.state = [state.tensors[str(number)].clone() for number in range(len(state.tensors))]


class Gained(Product):
    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        self.gain = 1.0

    def added(self, x: Tensor) -> Tensor:
        return super().added(x) * self.gain


class GainNotSaved(Plugin):
    """Changes a plain attribute of which forward and delta make use, and which is not in the file."""

    adapter = Gained

    @hookimpl
    def tunerkit_delta(self, adapter: Product) -> Delta:
        return Delta(weight=vars(adapter)["gain"] * adapter.b @ adapter.a)

    @hookimpl
    def tunerkit_after_step(self, tuner: Tuner) -> None:
        for adapter in tuner.adapters().values():
            vars(adapter)["gain"] *= 1.1
