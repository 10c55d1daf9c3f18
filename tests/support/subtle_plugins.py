"""Plugins with one mistake for each check that `tests.support.bad_plugins` does not need."""

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import attrs
import torch
from torch import Tensor, nn

from tests.support.bad_plugins import (
    METHOD,
    ChangesAfterAStep,
    Counting,
    DeltaTransposed,
    HiddenState,
    Plugin,
    Product,
    TrainsTheGainOnce,
)
from tests.support.hard_plugins import MixesSamples
from tunerkit.errors import TargetError
from tunerkit.plugin import (
    Adapter,
    BaseLayer,
    Delta,
    Factors,
    Method,
    ParamGroup,
    Statistics,
    StatisticsRequest,
    Target,
    Tuner,
    add_low_rank,
    hookimpl,
    low_rank_factors,
    setting,
)
from tunerkit_testing.toy_adapters import Principal
from tunerkit_testing.toy_methods import LowRankConfig


def with_config(config: type) -> type:
    """The plugin without a mistake in its hooks, with another config class."""

    class Configured(Plugin):
        @hookimpl
        def tunerkit_methods(self) -> list[Method]:
            return [Method(METHOD, config=config)]

    return Configured


def with_adapter(adapter: type[Product]) -> type:
    """The plugin without a mistake in its hooks, with another adapter class."""
    return type("Adapted", (Plugin,), {"adapter": adapter})


# --- Configs ----------------------------------------------------------------------------------------------------------


@attrs.frozen
class CountingUp(LowRankConfig):
    rank: int = setting(2, ge=1, converter=lambda rank: rank + 1, doc="Larger at each reading.")


@attrs.frozen
class Lenient(LowRankConfig):
    rank: int = setting(2, converter=lambda rank: rank if type(rank) is int else 2, doc="Anything.")


@attrs.frozen
class Resetting(LowRankConfig):
    def settled(self) -> Self:
        return attrs.evolve(self, rank=2)


# --- The start, and what is shared ------------------------------------------------------------------------------------


class Drawn(Product):
    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        self.a.data.add_(random.random())


class Counted(Product):
    built: ClassVar[int] = 0

    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        Counted.built += 1
        self.a.data.add_(Counted.built)


class HidesItsStart(Principal):
    """Starts from W, and says that it does not read W."""

    reads_weight = False


class StartsFromTheWeight(Plugin):
    @hookimpl
    def tunerkit_methods(self) -> list[Method]:
        return [Method(METHOD, config=LowRankConfig, start="rounding")]

    @hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer, config: LowRankConfig) -> Adapter:
        return HidesItsStart(base, config.rank)

    @hookimpl
    def tunerkit_delta(self, adapter: Principal) -> Delta:  # type: ignore[override]
        q, p = adapter.difference()
        return Delta(weight=p @ q)


class SharingPlugin(Plugin):
    """Adapters share a factor ``g``, fixed at 1."""

    @hookimpl
    def tunerkit_shared(self) -> nn.Module:
        shared = nn.Module()
        shared.register_buffer("g", torch.ones(()))
        return shared


class Scaled(Product):
    def added(self, x: Tensor) -> Tensor:
        shared: Any = self.shared
        return super().added(x) * shared.g


class WritesShared(Product):
    def added(self, x: Tensor) -> Tensor:
        self.shared.get_buffer("g").mul_(0.99)
        return super().added(x)


class ChangesShared(SharingPlugin):
    adapter = WritesShared


class ChangesSharedAtBuild(SharingPlugin):
    @hookimpl
    def tunerkit_build_adapter(  # type: ignore[override]
        self, base: BaseLayer, config: LowRankConfig, shared: nn.Module
    ) -> Adapter:
        shared.get_buffer("g").data.mul_(0.99)  # no version counter sees it
        return Scaled(base, config.rank)


class CalibratesTooMuch(Plugin):
    @hookimpl
    def tunerkit_methods(self) -> list[Method]:
        return [Method(METHOD, config=LowRankConfig, statistics=StatisticsRequest(inputs=2))]

    @hookimpl
    def tunerkit_calibrate(self, tuner: Tuner, statistics: Mapping[str, Statistics]) -> None:
        for parameter in tuner.parameters():
            parameter.fill_(0.1)


# --- Training ---------------------------------------------------------------------------------------------------------


class ThawsTheBase(Plugin):
    @hookimpl
    def tunerkit_start(self, tuner: Tuner) -> None:
        for target in tuner.targets:
            target.module.requires_grad_(True)


class HalfFixed(Product):
    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        self.a.requires_grad_(False)


class MovesFixed(Plugin):
    adapter = HalfFixed

    @hookimpl
    def tunerkit_after_step(self, tuner: Tuner) -> None:
        for parameter in tuner.parameters():
            if not parameter.requires_grad:
                parameter.mul_(0.99)


class WrongSign(Product):
    def added(self, x: Tensor) -> Tensor:
        h = super().added(x)
        return h - 2 * h.detach()  # -h, with the gradient of h


class HardlyTrains(Product):
    def added(self, x: Tensor) -> Tensor:
        return super().added(x) * 1e-6


class OnlyInTraining(Product):
    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(base, x, y) if self.training else y + 0 * self.added(x).to(y.dtype)


class ChangesTheHead(Plugin):
    @hookimpl
    def tunerkit_after_step(self, tuner: Tuner) -> None:
        for name, parameter in tuner.named_parameters():
            if ".copy." in name:
                parameter.mul_(-2)


class ThawsItself(Product):
    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        self.requires_grad_(True)
        return super().forward(base, x, y)


class GroupsTwice(Plugin):
    @hookimpl
    def tunerkit_param_groups(self, tuner: Tuner) -> Iterable[ParamGroup]:
        return [ParamGroup([parameter], lr_scale=2.0) for parameter in [*tuner.parameters()][:1] * 2]


class DecaysInBackward(Product):
    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        self.a.register_hook(lambda gradient: gradient + 0.1 * self.a.detach())


class ReadsItsCalls(Counting):
    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return y + self.added(x).to(y.dtype) * self.calls


class Overflowing(Product):
    def added(self, x: Tensor) -> Tensor:
        h = super().added(x)
        return (h.half() * 1e5).float() if torch.is_autocast_enabled("cpu") else h


class CastsItself(Product):
    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        for parameter in self.parameters():
            parameter.data = parameter.data.to(y.dtype)
        return super().forward(base, x, y)


class ReusesY(Product):
    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return add_low_rank(base, x, y, q=self.a, p=self.b, scale=1.0) + 0.1 * y


class LoopsInAStep(Plugin):
    @hookimpl
    def tunerkit_after_step(self, tuner: Tuner) -> None:
        for parameter in tuner.parameters():
            for row in parameter:
                for _ in range(100):
                    row.abs()


# --- Deltas and ranks -------------------------------------------------------------------------------------------------


class FactorsTooSmall(Plugin):
    @hookimpl
    def tunerkit_factors(self, adapter: Product) -> Factors:
        return low_rank_factors(adapter.a, adapter.b, scale=0.5)


class OneRankTooHigh(Product):
    @property
    def rank(self) -> int:
        return self.a.shape[0] + 1


class RankTooHigh(Plugin):
    """The delta is right, so that only the factors show the rank."""

    adapter = OneRankTooHigh

    @hookimpl
    def tunerkit_factors(self, adapter: Product) -> Factors:
        return low_rank_factors(adapter.a, adapter.b, scale=1.0)


class BuildsTooLarge(Plugin):
    @hookimpl
    def tunerkit_factors(self, adapter: Product) -> Factors:
        return low_rank_factors(adapter.a, adapter.b, scale=1.0)

    @hookimpl
    def tunerkit_from_factors(
        self, targets: Sequence[Target], factors: Mapping[str, Factors]
    ) -> tuple[LowRankConfig, dict[str, Adapter]]:
        adapters: dict[str, Adapter] = {}
        for path, each in factors.items():
            adapters[path] = adapter = Product.__new__(Product)
            nn.Module.__init__(adapter)
            adapter.a, adapter.b = nn.Parameter(each.q), nn.Parameter(2 * each.p)
        return LowRankConfig(), adapters


class BudgetLies(Plugin):
    @hookimpl
    def tunerkit_budget(self, tuner: Tuner, step: int | None) -> int:
        now = tuner.steps if step is None else step
        return sum(tuner.ranks().values()) - (1 if now else 0)


class LeavesABuffer(Plugin):
    @hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer, config: LowRankConfig) -> Adapter:
        base.module.register_buffer("extra", torch.zeros(1))
        return Product(base, config.rank)


class DeltaWrites(Plugin):
    @hookimpl
    def tunerkit_delta(self, adapter: Product) -> Delta:
        weight = adapter.b @ adapter.a
        adapter.b.data.mul_(0.5)
        return Delta(weight=weight)


class Scales(Product):
    """Multiplies y, and says that it does not read it."""

    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        self.l = nn.Parameter(torch.zeros(base.out_features))

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return y + (y * base.shape_bias(self.l)).to(y.dtype)


class ReadsOutputInSecret:
    @hookimpl
    def tunerkit_methods(self) -> list[Method]:
        return [Method(METHOD, config=LowRankConfig)]

    @hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer, config: LowRankConfig) -> Adapter:
        return Scales(base, config.rank)

    @hookimpl
    def tunerkit_delta(self, adapter: Scales, base: BaseLayer) -> Delta:
        bias = base.bias()
        return Delta(weight=adapter.l[:, None] * base.dense(), bias=None if bias is None else bias * adapter.l)


# --- Files and copies -------------------------------------------------------------------------------------------------


class HalfDeclared(Product):
    rank_dims: ClassVar[Mapping[str, int]] = {"a": 0}


class NeverCopied(Product):
    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class ReadsTheModule(Product):
    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(base, x, y) + 0 * base.module.get_parameter("weight").sum()


class NoRoomIn(Plugin):
    """Refuses layers of 6 features, which are those of the small square network."""

    @hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer, config: LowRankConfig) -> Adapter:
        if base.in_features == base.out_features == 6:
            raise TargetError("6 features are too few")
        return Product(base, config.rank)


# The check that must fail, with the plugin that it must fail for.
CAUGHT: tuple[tuple[str, type], ...] = (
    ("config_round_trip", with_config(CountingUp)),
    ("bad_config_refused", with_config(Lenient)),
    ("random_state", with_adapter(Drawn)),
    ("seed", with_adapter(Counted)),
    ("seed", StartsFromTheWeight),
    ("rank", StartsFromTheWeight),
    ("large_batch", MixesSamples),
    ("shared_module_kept", ChangesShared),
    ("shared_module_kept", ChangesSharedAtBuild),
    ("shared_module_used", SharingPlugin),
    ("calibration_keeps_the_start", CalibratesTooMuch),
    ("only_the_adapter_trains", ThawsTheBase),
    ("fixed_stays_fixed", MovesFixed),
    ("same_in_training", with_adapter(OnlyInTraining)),
    ("gradients_are_true", with_adapter(WrongSign)),
    ("delta_gives_gradients", TrainsTheGainOnce),
    ("loss_falls", with_adapter(WrongSign)),
    ("loss_falls", with_adapter(OnlyInTraining)),
    ("loss_falls", with_adapter(HardlyTrains)),
    ("trains_beside_copies", ChangesTheHead),
    ("freezing", with_adapter(ThawsItself)),
    ("param_groups", GroupsTwice),
    ("accumulation", with_adapter(DecaysInBackward)),
    ("checkpointing", with_adapter(ReadsItsCalls)),
    ("autocast", with_adapter(Overflowing)),
    ("bf16_base", with_adapter(CastsItself)),
    ("fused_is_plain", with_adapter(ReusesY)),
    ("factors_are_the_delta", FactorsTooSmall),
    ("builds_from_factors", BuildsTooLarge),
    ("rank", RankTooHigh),
    ("budget", BudgetLies),
    ("disabled_is_the_base", ChangesAfterAStep),
    ("unwraps", LeavesABuffer),
    ("merges", DeltaWrites),
    ("keeps_merged", DeltaTransposed),
    ("stacked_first", ReadsOutputInSecret),
    ("stacked_second", ReadsOutputInSecret),
    ("other_rank_setting", with_config(Resetting)),
    ("other_ranks_load", with_adapter(HalfDeclared)),
    ("deepcopy", with_adapter(NeverCopied)),
    ("offload", with_adapter(ReadsTheModule)),
    ("compiles", HiddenState),
)
