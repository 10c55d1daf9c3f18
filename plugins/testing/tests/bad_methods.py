"""Methods with one mistake each: the check that must fail, and words that its sentence must have.

Rows with ``what`` are on the documentation's page; of all checks, theirs must be the first that fails. A row is an
adapter, which gets hooks without a mistake, a config, or a plugin.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self, TypeVar

import attrs
import torch
from torch import Tensor, nn

from tests.support.toy_starts import Principal
from tunerkit.errors import TargetError
from tunerkit.plugin import (
    Adapter,
    AdapterConfig,
    BaseLayer,
    Delta,
    Factors,
    Method,
    ParamGroup,
    State,
    Statistics,
    StatisticsRequest,
    Target,
    Tuner,
    add_low_rank,
    hookimpl,
    low_rank_factors,
    optimizer_of,
    setting,
)
from tunerkit_testing import Case, CheckResult, check_method, known_cases, small
from tunerkit_testing.checks.order import BY_NAME
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import LowRankConfig

Class = TypeVar("Class", bound=type)

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


# --- The table --------------------------------------------------------------------------------------------------------


@attrs.frozen
class Mistake:
    """One row.

    Attributes:
        plugin: The plugin's class.
        check: The check that must fail.
        says: Words that its sentence must have, about the cause.
        what: What is wrong, in a few words, if the row is on the documentation's page.
        case: The model on which it fails; the small network, unless the mistake needs another layer.
    """

    plugin: type
    check: str
    says: str
    what: str
    case: str


MISTAKES: list[Mistake] = []


def wrong(check: str, says: str = "", *, what: str = "", case: str = "") -> Callable[[Class], Class]:
    """Add a class to the table: a plugin, or an adapter or a config of which one is made."""

    def add(found: Class) -> Class:
        MISTAKES.append(Mistake(plugin_of(found), check, says, what, case))
        return found

    return add


def plugin_of(found: type) -> type:
    """The plugin without a mistake in its hooks, with another adapter class or config class; or a plugin as it is."""
    if issubclass(found, Product):
        return type(found.__name__, (Plugin,), {"adapter": found})
    if issubclass(found, AdapterConfig):
        methods = hookimpl(lambda self: [Method(METHOD, config=found)])
        return type(found.__name__, (Plugin,), {"tunerkit_methods": methods})
    return found


def results(plugin: type, case: str = "", *, last: str | None = None) -> list[CheckResult]:
    """Register a plugin, and run all checks of its method, up to ``last``, on a small model, or a case of this name."""
    checks = [*BY_NAME][: None if last is None else [*BY_NAME].index(last) + 1]
    with registered(plugin()):
        return check_method(METHOD, cases=known_cases.named([case]) if case else [CASE], checks=checks)


def first_failure(found: Iterable[CheckResult]) -> CheckResult:
    """The first check that did not pass."""
    return next(result for result in found if result.status in ("failed", "error"))


# --- The base ---------------------------------------------------------------------------------------------------------


@wrong("building_keeps_the_base", what="changes the base when it builds an adapter")
class ChangesAtBuild(Plugin):
    @hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer, config: LowRankConfig) -> Adapter:
        base.module.get_parameter("weight").data.mul_(0.9)
        return Product(base, config.rank)


@wrong("forward_keeps_the_base", what="changes the base in forward")
class WritesTheBase(Product):
    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        base.module.get_parameter("weight").data.mul_(0.999)
        return super().forward(base, x, y)


@wrong("steps_keep_the_base", what="changes the base after a step")
@wrong("disabled_is_the_base")
class ChangesAfterAStep(Plugin):
    @hookimpl
    def tunerkit_after_step(self, tuner: Tuner) -> None:
        for target in tuner.targets:
            target.module.get_parameter("weight").data.mul_(0.999)


@wrong("forward_runs", "forward wrote into the base's weight")
class CentresTheBase(Product):
    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        weight = base.module.get_parameter("weight")
        with torch.no_grad():
            weight.sub_(weight.mean())
        return super().forward(base, x, y)


@wrong("forward_runs", "forward wrote into the base's weight")
class BorrowsTheBase(Product):
    """Writes into the weight, and puts back what was there."""

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        weight = base.module.get_parameter("weight")
        with torch.no_grad():
            before = weight.clone()
            weight.mul_(2)
            weight.copy_(before)
        return super().forward(base, x, y)


class ReadsTheWeight(Product):
    """Adds ``b a W x``, where W is what the module has at the moment."""

    reads_weight: ClassVar[bool] = True
    live: ClassVar[bool] = False

    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        self.a = nn.Parameter(torch.randn(rank, base.out_features))

    def weight(self, base: BaseLayer) -> Tensor:
        """W, (out, in)."""
        return (base.module.get_parameter("weight") if self.live else base.dense()).to(self.a.dtype)

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return y + (x.to(self.a.dtype) @ self.weight(base).T @ self.a.T @ self.b.T).to(y.dtype)


class ReadsTheLiveWeight(ReadsTheWeight):
    live = True


@wrong("offload", "the delta is computed from the live weights of base.module")
class DeltaOfTheLiveWeight(Plugin):
    adapter = ReadsTheWeight

    @hookimpl
    def tunerkit_delta(self, adapter: ReadsTheWeight, base: BaseLayer) -> Delta:  # type: ignore[override]
        weight = base.module.get_parameter("weight")
        return Delta(weight=adapter.b @ adapter.a @ weight.to(adapter.a.dtype))


@wrong("offload", "forward is computed from the live weights of base.module")
class ForwardOfTheLiveWeight(Plugin):
    adapter = ReadsTheLiveWeight

    @hookimpl
    def tunerkit_delta(self, adapter: ReadsTheWeight, base: BaseLayer) -> Delta:  # type: ignore[override]
        return Delta(weight=adapter.b @ adapter.a @ base.dense().to(adapter.a.dtype))


# --- The start, random numbers, and what is shared --------------------------------------------------------------------


@wrong("start", what="the start moves the output by 1e-2")
class StartsFarOff(Product):
    shift = 2e-3

    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        nn.init.constant_(self.b, self.shift)


@wrong("start", what="the start moves the output by 1e-6")
class StartsCloseBy(StartsFarOff):
    shift = 2e-7


@wrong("random_state")
class Drawn(Product):
    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        self.a.data.add_(random.random())


@wrong("seed")
class Counted(Product):
    built: ClassVar[int] = 0

    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        Counted.built += 1
        self.a.data.add_(Counted.built)


class HidesItsStart(Principal):
    """Starts from W, and says that it does not read W."""

    reads_weight = False


@wrong("seed")
@wrong("rank")
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


@wrong("shared_module_used")
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


@wrong("shared_module_kept")
class ChangesShared(SharingPlugin):
    adapter = WritesShared


@wrong("shared_module_kept")
class ChangesSharedAtBuild(SharingPlugin):
    @hookimpl
    def tunerkit_build_adapter(  # type: ignore[override]
        self, base: BaseLayer, config: LowRankConfig, shared: nn.Module
    ) -> Adapter:
        shared.get_buffer("g").data.mul_(0.99)  # no version counter sees it
        return Scaled(base, config.rank)


@wrong("calibration_keeps_the_start")
class CalibratesTooMuch(Plugin):
    @hookimpl
    def tunerkit_methods(self) -> list[Method]:
        return [Method(METHOD, config=LowRankConfig, statistics=StatisticsRequest(inputs=2))]

    @hookimpl
    def tunerkit_calibrate(self, tuner: Tuner, statistics: Mapping[str, Statistics]) -> None:
        for parameter in tuner.parameters():
            parameter.fill_(0.1)


@wrong("seed", "a generator with a fixed seed")
class SeedsItself(Product):
    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        nn.init.normal_(self.a, generator=torch.Generator().manual_seed(0))


@wrong("seed", "CountedAtBuild.built changed meanwhile")
class CountedAtBuild(Product):
    built: ClassVar[int] = 0

    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        type(self).built += 1
        self.a.data.add_(type(self).built)


_GENERATOR = torch.Generator().manual_seed(0)


@wrong("seed", "no generator that goes on from one adapter to the next")
class DrawsOn(Product):
    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        nn.init.normal_(self.a, generator=_GENERATOR)


class Projected(Product):
    """Its ``a`` is fixed, drawn from a seed, and no part of the file."""

    a: Tensor  # type: ignore[assignment]  # a parameter in the class above

    def __init__(self, base: BaseLayer, rank: int, seed: int) -> None:
        super().__init__(base, rank)
        del self.a
        drawn = torch.randn(rank, base.in_features, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("a", drawn, persistent=False)


@wrong("other_process", what="seeds with `hash()` of a path")
class SeedsByHash(Plugin):
    @hookimpl
    def tunerkit_build_adapter(  # type: ignore[override]
        self, target: Target, base: BaseLayer, config: LowRankConfig
    ) -> Adapter:
        return Projected(base, config.rank, hash(target.path) % 2**32)


@wrong("random_state", what="calls `torch.manual_seed` when it builds an adapter")
class SeedsTorch(Plugin):
    @hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer, config: LowRankConfig) -> Adapter:
        torch.manual_seed(42)
        return Product(base, config.rank)


@wrong("random_state", what="calls `torch.manual_seed` in forward")
class Reseeding(Product):
    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        torch.manual_seed(42)
        return super().forward(base, x, y)


@wrong("random_state", what="calls `torch.manual_seed` in a step")
class SeedsTorchInAStep(Plugin):
    @hookimpl
    def tunerkit_after_step(self, tuner: Tuner) -> None:
        torch.manual_seed(tuner.steps)


# --- Forward ----------------------------------------------------------------------------------------------------------


@wrong("no_hidden_state", what="forward counts its calls and uses the number")
@wrong("compiles")
class Counting(Product):
    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        self.calls = 0

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return y + self.added(x).to(y.dtype) * (1 + 0.01 * self.calls)


@wrong("inputs_unwritten", what="forward writes into x")
class Scribbling(Product):
    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(base, x.data.mul_(0.5), y)


@wrong("output_dtype", what="the output is fp32 on a bf16 base")
class Widening(Product):
    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return y + self.added(x)


@wrong("pickle", what="an adapter cannot be pickled")
class HoldsALambda(Product):
    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        self.activation: Callable[[Tensor], Tensor] = lambda h: h


# --- Training ---------------------------------------------------------------------------------------------------------


@wrong("something_trains", what="trains nothing: every parameter is fixed")
class Fixed(Product):
    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        self.requires_grad_(False)


@wrong("gradients_reach_every_tensor", what="trains nothing: forward detaches")
class Detached(Product):
    def added(self, x: Tensor) -> Tensor:
        return super().added(x).detach()


@wrong("every_tensor_moves", what="trains nothing: both factors start at 0")
class AllZero(Product):
    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        nn.init.zeros_(self.a)


@wrong("gradients_reach_every_tensor", what="half of the tensors have no gradient")
class HalfDetached(Product):
    def added(self, x: Tensor) -> Tensor:
        return x.to(self.a.dtype) @ self.a.detach().T @ self.b.T


@wrong("gradients_are_true", what="half of what forward adds is detached")
class HalfOfTheGradient(Product):
    def added(self, x: Tensor) -> Tensor:
        h = super().added(x)
        return 0.5 * h + 0.5 * h.detach()


@wrong("gradients_are_true", what="forward detaches x")
class CutsTheInput(Product):
    def added(self, x: Tensor) -> Tensor:
        return super().added(x.detach())


@wrong("same_in_training", what="adds less in training mode than in eval mode")
class LessInTraining(Product):
    def added(self, x: Tensor) -> Tensor:
        return super().added(x) * (0.9 if self.training else 1.0)


class Amplified(Product):
    trains_the_gain = True

    def added(self, x: Tensor) -> Tensor:
        gain = self.shared.get_parameter("gain")
        return super().added(x) * (gain if self.trains_the_gain else gain.detach())


@wrong("gradients_are_true", what="a shared tensor has no gradient at one target")
@wrong("delta_gives_gradients")
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


@wrong("only_the_adapter_trains")
class ThawsTheBase(Plugin):
    @hookimpl
    def tunerkit_start(self, tuner: Tuner) -> None:
        for target in tuner.targets:
            target.module.requires_grad_(True)


class HalfFixed(Product):
    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        self.a.requires_grad_(False)


@wrong("fixed_stays_fixed")
class MovesFixed(Plugin):
    adapter = HalfFixed

    @hookimpl
    def tunerkit_after_step(self, tuner: Tuner) -> None:
        for parameter in tuner.parameters():
            if not parameter.requires_grad:
                parameter.mul_(0.99)


@wrong("gradients_are_true")
@wrong("loss_falls")
class WrongSign(Product):
    def added(self, x: Tensor) -> Tensor:
        h = super().added(x)
        return h - 2 * h.detach()  # -h, with the gradient of h


@wrong("loss_falls")
class HardlyTrains(Product):
    def added(self, x: Tensor) -> Tensor:
        return super().added(x) * 1e-6


@wrong("same_in_training")
@wrong("loss_falls")
class OnlyInTraining(Product):
    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(base, x, y) if self.training else y + 0 * self.added(x).to(y.dtype)


@wrong("trains_beside_copies")
class ChangesTheHead(Plugin):
    @hookimpl
    def tunerkit_after_step(self, tuner: Tuner) -> None:
        for name, parameter in tuner.named_parameters():
            if ".copy." in name:
                parameter.mul_(-2)


@wrong("freezing")
class ThawsItself(Product):
    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        self.requires_grad_(True)
        return super().forward(base, x, y)


@wrong("param_groups")
class GroupsTwice(Plugin):
    @hookimpl
    def tunerkit_param_groups(self, tuner: Tuner) -> Iterable[ParamGroup]:
        return [ParamGroup([parameter], lr_scale=2.0) for parameter in [*tuner.parameters()][:1] * 2]


@wrong("accumulation")
class DecaysInBackward(Product):
    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        self.a.register_hook(lambda gradient: gradient + 0.1 * self.a.detach())


@wrong("checkpointing")
class ReadsItsCalls(Counting):
    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return y + self.added(x).to(y.dtype) * self.calls


@wrong("autocast")
class Overflowing(Product):
    def added(self, x: Tensor) -> Tensor:
        h = super().added(x)
        return (h.half() * 1e5).float() if torch.is_autocast_enabled("cpu") else h


@wrong("bf16_base")
class CastsItself(Product):
    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        for parameter in self.parameters():
            parameter.data = parameter.data.to(y.dtype)
        return super().forward(base, x, y)


@wrong("fused_is_plain")
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


_ROWS = 40  # more than any case has


class _Matmul(torch.autograd.Function):
    """``x a^T``, whose backward leaves out the last rows of a large batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor) -> Tensor:
        ctx.save_for_backward(x, a)
        return torch.nn.functional.linear(x, a).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, a = ctx.saved_tensors
        gradient = gradient.to(a.dtype)
        return gradient @ a, gradient.flatten(0, -2)[:_ROWS].T @ x.flatten(0, -2)[:_ROWS]


@wrong("large_batch", what="gradients are wrong above 40 rows")
class LeavesOutRows(Product):
    def added(self, x: Tensor) -> Tensor:
        found: Tensor = _Matmul.apply(x.to(self.a.dtype), self.a)  # type: ignore[no-untyped-call]
        return found @ self.b.T


class Centred(Product):
    def added(self, x: Tensor) -> Tensor:
        h = super().added(x)
        return h - h.mean(0)


@wrong("large_batch")
class MixesSamples(Plugin):
    adapter = Centred

    @hookimpl
    def tunerkit_methods(self) -> list[Method]:
        return [Method(METHOD, config=LowRankConfig, targets="outputs")]


# --- Deltas and ranks -------------------------------------------------------------------------------------------------


@wrong("rank", what="says rank 1, adds rank 2")
class Modest(Product):
    @property
    def rank(self) -> int:
        return 1


@wrong("delta_is_what_forward_adds", what="the delta is 0.999 times what forward adds")
class DeltaTooSmall(Plugin):
    @hookimpl
    def tunerkit_delta(self, adapter: Product) -> Delta:
        return Delta(weight=0.999 * adapter.b @ adapter.a)


@wrong("delta_gives_gradients", what="the delta has no gradient for half of the tensors")
class DeltaHalfDetached(Plugin):
    @hookimpl
    def tunerkit_delta(self, adapter: Product) -> Delta:
        return Delta(weight=adapter.b @ adapter.a.detach())


@wrong("delta_is_what_forward_adds", what="the delta is transposed")
@wrong("keeps_merged")
class DeltaTransposed(Plugin):
    @hookimpl
    def tunerkit_delta(self, adapter: Product) -> Delta:
        return Delta(weight=(adapter.b @ adapter.a).T)


@wrong("delta_is_what_forward_adds", what="there is no delta")
class DeltaMissing:
    @hookimpl
    def tunerkit_methods(self) -> list[Method]:
        return [Method(METHOD, config=LowRankConfig)]

    @hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer, config: LowRankConfig) -> Adapter:
        return Product(base, config.rank)


@wrong("rank", what="says rank 7, adds rank 2")
class RankOfSeven(Product):
    @property
    def rank(self) -> int:
        return 7


class HalfGone(Product):
    """Says its first rank, whatever a step hook left of it."""

    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        self.register_buffer("mask", torch.ones(rank))

    def added(self, x: Tensor) -> Tensor:
        return x.to(self.a.dtype) @ (self.get_buffer("mask")[:, None] * self.a).T @ self.b.T


@wrong("rank", what="says its first rank after a step took half of it")
class RankOfTheStart(Plugin):
    adapter = HalfGone

    @hookimpl
    def tunerkit_delta(self, adapter: Product) -> Delta:
        return Delta(weight=adapter.b @ (adapter.get_buffer("mask")[:, None] * adapter.a))

    @hookimpl
    def tunerkit_after_step(self, tuner: Tuner) -> None:
        for adapter in tuner.adapters().values():
            adapter.get_buffer("mask")[0] = 0


class SmallLastPair(Product):
    """Its last pair of rows and columns counts for 1e-7 of what the others do; no mistake."""

    def scaled(self) -> Tensor:
        return torch.cat([self.a[:-1], self.a[-1:] * 1e-7])

    def added(self, x: Tensor) -> Tensor:
        return x.to(self.a.dtype) @ self.scaled().T @ self.b.T


class NearlyOfALowerRank(Plugin):
    adapter = SmallLastPair

    @hookimpl
    def tunerkit_delta(self, adapter: SmallLastPair) -> Delta:  # type: ignore[override]
        return Delta(weight=adapter.b @ adapter.scaled())


@wrong("factors_are_the_delta")
class FactorsTooSmall(Plugin):
    @hookimpl
    def tunerkit_factors(self, adapter: Product) -> Factors:
        return low_rank_factors(adapter.a, adapter.b, scale=0.5)


class OneRankTooHigh(Product):
    @property
    def rank(self) -> int:
        return self.a.shape[0] + 1


@wrong("rank")
class RankTooHigh(Plugin):
    """The delta is right, so that only the factors show the rank."""

    adapter = OneRankTooHigh

    @hookimpl
    def tunerkit_factors(self, adapter: Product) -> Factors:
        return low_rank_factors(adapter.a, adapter.b, scale=1.0)


@wrong("builds_from_factors")
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


@wrong("budget")
class BudgetLies(Plugin):
    @hookimpl
    def tunerkit_budget(self, tuner: Tuner, step: int | None) -> int:
        now = tuner.steps if step is None else step
        return sum(tuner.ranks().values()) - (1 if now else 0)


@wrong("unwraps")
class LeavesABuffer(Plugin):
    @hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer, config: LowRankConfig) -> Adapter:
        base.module.register_buffer("extra", torch.zeros(1))
        return Product(base, config.rank)


@wrong("merges")
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


@wrong("stacked_first")
@wrong("stacked_second")
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


class LeavesOutARank(Product):
    rank_dims: ClassVar[dict[str, int]] = {"a": 0, "b": 1}

    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        self.gains = nn.Parameter(torch.ones(rank))

    def added(self, x: Tensor) -> Tensor:
        return x.to(self.a.dtype) @ self.a.T @ (self.b * self.gains).T


@wrong("rank", "rank_dims leaves out gains")
class LeavesItOut(Plugin):
    adapter = LeavesOutARank

    @hookimpl
    def tunerkit_delta(self, adapter: LeavesOutARank) -> Delta:  # type: ignore[override]
        return Delta(weight=(adapter.b * adapter.gains) @ adapter.a)


@wrong("delta_is_what_forward_adds", "the delta lacks a bias")
class Shifts(Product):
    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        self.shift = nn.Parameter(torch.zeros(base.out_features))

    def added(self, x: Tensor) -> Tensor:
        return super().added(x) + self.shift


# --- Dropout ----------------------------------------------------------------------------------------------------------


@attrs.frozen
class DropoutConfig(LowRankConfig):
    dropout: float = setting(0.0, ge=0.0, lt=1.0, doc="Share of the inputs that are dropped in training.")


class Dropping(Product):
    """Drops inputs as it should."""

    p = 0.0
    by: ClassVar[str] = "torch"

    def added(self, x: Tensor) -> Tensor:
        if self.by == "torch":
            x = nn.functional.dropout(x, self.p, self.training)
        elif self.by == "mask" and self.training:
            x = x * (torch.rand_like(x) >= self.p)
        return super().added(x)


class Dropout(Plugin):
    """The setting ``dropout`` without a mistake."""

    adapter = Dropping

    @hookimpl
    def tunerkit_methods(self) -> list[Method]:
        return [Method(METHOD, config=DropoutConfig)]

    @hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer, config: DropoutConfig) -> Adapter:  # type: ignore[override]
        adapter: Any = self.adapter(base, config.rank)
        adapter.p = config.dropout
        return adapter


class NeverDropping(Dropping):
    by = "nothing"


@wrong("dropout", what="dropout is ignored")
class DropoutIgnored(Dropout):
    adapter = NeverDropping


class DroppingUnscaled(Dropping):
    by = "mask"


@wrong("dropout", what="dropout is not scaled")
class DropoutUnscaled(Dropout):
    adapter = DroppingUnscaled


class AlwaysDropping(Dropping):
    def added(self, x: Tensor) -> Tensor:
        return Product.added(self, nn.functional.dropout(x, self.p, training=True))


@wrong("dropout", what="dropout goes on in eval mode")
class DropoutInEval(Dropout):
    adapter = AlwaysDropping


# --- Steps ------------------------------------------------------------------------------------------------------------


class NeedsSteps(Plugin):
    """The method ``bad`` with the declaration that its hooks must be called."""

    @hookimpl
    def tunerkit_methods(self) -> list[Method]:
        return [Method(METHOD, config=LowRankConfig, needs_steps=True)]


def own(tuner: Tuner) -> list[nn.Parameter]:
    """The parameters of the adapters, without those of modules that are trained in full."""
    return [parameter for adapter in tuner.adapters().values() for parameter in adapter.parameters()]


@wrong("grad_scale", what="adds gradients without grad_scale")
class IgnoresGradScale(NeedsSteps):
    @hookimpl
    def tunerkit_before_step(self, tuner: Tuner) -> None:
        for parameter in own(tuner):
            if parameter.grad is not None:
                parameter.grad += 0.1 * parameter.detach()


@wrong("resumes", what="keeps averages that it does not save")
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


@wrong("saves_and_loads", what="forward uses a plain attribute that training changes")
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


@wrong("resumes_late", "than at save_state: tuner.state[0]")
class LateAverage(NeedsSteps):
    """Keeps an average from the start, which pulls from step 40 on, and does not save it."""

    @hookimpl
    def tunerkit_start(self, tuner: Tuner) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in own(tuner)]

    @hookimpl
    def tunerkit_after_step(self, tuner: Tuner, step: int) -> None:
        averages: Any = tuner.state
        for average, parameter in zip(averages, own(tuner), strict=True):
            average.lerp_(parameter.detach(), 0.1)
            if step > 40:
                parameter.lerp_(average, 0.01)


@wrong("resumes", "After load_state these were others than at save_state: tuner.state['count']")
class UnsavedCounter(NeedsSteps):
    """Counts its steps, and shrinks every fourth time."""

    @hookimpl
    def tunerkit_start(self) -> dict[str, int]:
        return {"count": 0}

    @hookimpl
    def tunerkit_after_step(self, tuner: Tuner) -> None:
        state: Any = tuner.state
        state["count"] += 1
        if state["count"] % 4 == 0:
            for parameter in own(tuner):
                parameter.mul_(0.99)


@wrong("resumes", "than at save_state: count of the adapter at '0'")
class UnsavedCounterOfTheAdapter(UnsavedCounter):
    @hookimpl
    def tunerkit_after_step(self, tuner: Tuner) -> None:
        for adapter in tuner.adapters().values():
            vars(adapter)["count"] = vars(adapter).get("count", 0) + 1
            if vars(adapter)["count"] % 4 == 0:
                for parameter in adapter.parameters():
                    parameter.mul_(0.99)


@wrong("trains_beside_copies", "a step hook changes gradient of 0.bias, which is not the method's")
class PenaltyOnAll(NeedsSteps):
    """Weight decay as a gradient, also for the head that is trained in full."""

    @hookimpl
    def tunerkit_before_step(self, tuner: Tuner, grad_scale: Tensor | None) -> None:
        for parameter in tuner.parameters():
            if parameter.grad is not None:
                parameter.grad.add_(0.01 * parameter.detach() * (1.0 if grad_scale is None else grad_scale))


@wrong("trains_beside_copies", "a step hook changes 0.bias, which is not the method's")
class DecaysAll(Plugin):
    """Weight decay after the step, also of the head."""

    @hookimpl
    def tunerkit_after_step(self, tuner: Tuner) -> None:
        for parameter in tuner.parameters():
            parameter.mul_(0.999)


@wrong("needs_steps", "declare Method(..., needs_steps=True)")
class ForgetsNeedsSteps(Plugin):
    """Norms each row of ``a`` after a step."""

    @hookimpl
    def tunerkit_after_step(self, tuner: Tuner) -> None:
        for adapter in tuner.adapters().values():
            a = adapter.get_parameter("a")
            a.div_(a.norm(dim=1, keepdim=True))


@wrong("every_tensor_moves", "is another nn.Parameter than the optimizer was given")
class ReplacesAParameter(NeedsSteps):
    @hookimpl
    def tunerkit_after_step(self, tuner: Tuner, step: int) -> None:
        if step == 6:
            for adapter in tuner.adapters().values():
                vars(adapter)["_parameters"]["b"] = nn.Parameter(adapter.get_parameter("b").detach() * 0.99)


@wrong("resumes_late", "is another nn.Parameter than the optimizer was given")
class ReplacesItLate(ReplacesAParameter):
    @hookimpl
    def tunerkit_after_step(self, tuner: Tuner, step: int) -> None:
        super().tunerkit_after_step(tuner, step - 40)


@wrong("resumes_late", "is another nn.Parameter than the optimizer was given")
class ReplacesItMuchLater(ReplacesAParameter):
    @hookimpl
    def tunerkit_after_step(self, tuner: Tuner, step: int) -> None:
        super().tunerkit_after_step(tuner, step - 100)


@wrong("trains_beside_copies", "a step hook changes the optimizer's lr")
class LowersTheRate(NeedsSteps):
    @hookimpl
    def tunerkit_after_step(self, tuner: Tuner) -> None:
        optimizer = optimizer_of(tuner)
        assert optimizer is not None
        for group in optimizer.param_groups:
            group["lr"] = 0.9 * group["lr"] + 1e-6


@wrong("trains_beside_copies", "in a step in which a target has no gradient")
class AsksEveryGradient(NeedsSteps):
    @hookimpl
    def tunerkit_before_step(self, tuner: Tuner) -> None:
        for parameter in own(tuner):
            parameter.grad.mul_(1)  # type: ignore[union-attr]  # the mistake


@wrong("no_hidden_state", "forward changed a of the adapter")
class NormsItselfInForward(Product):
    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        self.a.data.div_(self.a.data.norm(dim=1, keepdim=True))
        return super().forward(base, x, y)


@wrong("unwraps", "unwrap left forward_hooks in the module")
class HooksTheLayer(Product):
    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        base.module.register_forward_hook(lambda module, args, output: None)


# --- Dtypes, modes, layouts and places --------------------------------------------------------------------------------


@wrong("half_precision", what="overflows on a base in fp16")
class OverflowsInHalf(Product):
    def added(self, x: Tensor) -> Tensor:
        return (x * 1e5).to(self.a.dtype) @ self.a.T @ self.b.T / 1e5


@wrong("half_precision", what="rounds to halves on a base in bf16")
class ChopsInBfloat(Product):
    """Computes with three bits where it is given 16."""

    def added(self, x: Tensor) -> Tensor:
        h = super().added(x)
        return (h * 2).round() / 2 if x.dtype == torch.bfloat16 else h


@wrong("same_in_inference", what="adds half in inference mode")
class ScaledInInference(Product):
    def added(self, x: Tensor) -> Tensor:
        return super().added(x) * (0.5 if torch.is_inference_mode_enabled() else 1.0)


@wrong("same_in_inference", what="adds half where there are no gradients")
class ScaledWithoutGradients(Product):
    def added(self, x: Tensor) -> Tensor:
        return super().added(x) * (1.0 if torch.is_grad_enabled() else 0.5)


@wrong("half_precision", "with adapters in torch.bfloat16, the output differs")
class WrongInItsOwnHalf(Product):
    def added(self, x: Tensor) -> Tensor:
        return super().added(x) * (2 if self.a.dtype == torch.bfloat16 else 1)


@wrong("half_precision", "with adapters in torch.float16, the output with the delta differs")
class DeltaWrongInHalf(Plugin):
    @hookimpl
    def tunerkit_delta(self, adapter: Product) -> Delta:
        return Delta(weight=adapter.b @ adapter.a * (2 if adapter.a.dtype == torch.float16 else 1))


@wrong("row_by_row", "that are not contiguous, forward raised RuntimeError")
class Viewing(Product):
    def added(self, x: Tensor) -> Tensor:
        rows = x.view(-1, x.shape[-1]).to(self.a.dtype)
        return (rows @ self.a.T @ self.b.T).view(*x.shape[:-1], -1)


@wrong("row_by_row", "use reshape or flatten in place of view")
class ViewsY(Product):
    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return (y.view(-1, y.shape[-1]) + self.added(x).to(y.dtype).reshape(-1, y.shape[-1])).view(y.shape)


class PlainTensor(Product):
    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        self.gains = {"out": torch.full((base.out_features,), 2.0)}

    def added(self, x: Tensor) -> Tensor:
        return super().added(x) * self.gains["out"].to(self.a.dtype)


@wrong("device", "gains['out'] is a tensor that is neither a parameter nor a buffer")
class HoldsATensor(Plugin):
    adapter = PlainTensor

    @hookimpl
    def tunerkit_delta(self, adapter: PlainTensor) -> Delta:  # type: ignore[override]
        return Delta(weight=adapter.gains["out"].to(adapter.a.dtype)[:, None] * (adapter.b @ adapter.a))


@wrong("autocast", "autocast_off(x.device)")
class RoundsUnderAutocast(ReadsTheWeight):
    """Adds ``(W R − W) x`` with R the identity at the start: under autocast W R is rounded."""

    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        self.a, self.b = nn.Parameter(torch.zeros(base.in_features)), nn.Parameter(torch.zeros(base.in_features))

    def change(self, base: BaseLayer) -> Tensor:
        weight = base.dense().float()
        return weight @ torch.diag(1 + self.a.float() + self.b.float()) - weight

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        delta = self.change(base)
        return y + (x.to(delta.dtype) @ delta.T).to(y.dtype)


@wrong("half_precision", "in torch.float16, the first output is NaN or inf")
class GuardsTooSmall(Product):
    def added(self, x: Tensor) -> Tensor:
        return x.to(self.a.dtype) @ self.a.T @ (self.b / (self.b.norm(dim=0, keepdim=True) + 1e-8)).T


_TWOS = torch.full((6,), 2.0)


class UsesAGlobalTensor(Product):
    def added(self, x: Tensor) -> Tensor:
        return super().added(x) * _TWOS.to(self.a.dtype)


@wrong("device", "use no tensor there that is neither an argument, a parameter nor a buffer")
class HoldsAGlobalTensor(Plugin):
    adapter = UsesAGlobalTensor

    @hookimpl
    def tunerkit_delta(self, adapter: Product) -> Delta:
        return Delta(weight=_TWOS.to(adapter.a.dtype)[:, None] * (adapter.b @ adapter.a))


@wrong("device", "make new ones with device=x.device")
class MakesOnTheCpu(Product):
    def added(self, x: Tensor) -> Tensor:
        return super().added(x) * torch.ones(self.b.shape[0], dtype=self.a.dtype)


# --- Other layers, weights and models ---------------------------------------------------------------------------------


@wrong("delta_is_what_forward_adds", what="the delta is transposed for Conv1D alone", case="gpt2")
class DeltaAsConv1DHasIt(Plugin):
    """Gives Conv1D its own layout, (in, out), where core asks for (out, in)."""

    @hookimpl
    def tunerkit_delta(self, adapter: Product, base: BaseLayer) -> Delta:  # type: ignore[override]
        weight = adapter.b @ adapter.a
        return Delta(weight=weight.T if _is_conv1d(base) and base.in_features == base.out_features else weight)


def _is_conv1d(base: BaseLayer) -> bool:
    return type(base.module).__name__ == "Conv1D"


@wrong("forward_runs", what="shapes do not fit in forward")
class Mismatched(Product):
    def added(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.to(self.a.dtype), self.b) @ self.a


@wrong("delta_is_what_forward_adds", what="the delta has another shape")
class DeltaDoesNotFit(Plugin):
    @hookimpl
    def tunerkit_delta(self, adapter: Product) -> Delta:
        return Delta(weight=adapter.a @ adapter.b)


@wrong("steps_run", what="shapes do not fit in a step")
class StepDoesNotFit(Plugin):
    @hookimpl
    def tunerkit_after_step(self, tuner: Tuner) -> None:
        for adapter in tuner.adapters().values():
            parts: Mapping[str, Tensor] = dict(adapter.named_parameters())
            parts["a"].add_(parts["b"])


class StartsFromTheBase(Product):
    """Adds ``b (a + rows) x``, where ``rows`` are the base's at building, and no part of the file."""

    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        self.register_buffer("rows", base.dense()[:rank].detach().clone(), persistent=False)

    def added(self, x: Tensor) -> Tensor:
        return x.to(self.a.dtype) @ self.rows_and_a().T @ self.b.T

    def rows_and_a(self) -> Tensor:
        """What ``b`` is multiplied with, (rank, in)."""
        return self.a + self.get_buffer("rows").to(self.a.dtype)


@wrong("state_is_all", what="keeps what it computed from the base, and does not save it")
class StartNotSaved(Plugin):
    adapter = StartsFromTheBase

    @hookimpl
    def tunerkit_delta(self, adapter: StartsFromTheBase) -> Delta:  # type: ignore[override]
        return Delta(weight=adapter.b @ adapter.rows_and_a())


_AVERAGES: dict[str, Tensor] = {}


@wrong("trainings_do_not_meet", what="keeps averages of all models in one dict")
class AveragesOfAllModels(Plugin):
    """Divides gradients by a running norm, kept by a target's path in a dict of this module."""

    @hookimpl
    def tunerkit_start(self) -> None:
        _AVERAGES.clear()

    @hookimpl
    def tunerkit_before_step(self, tuner: Tuner, grad_scale: Tensor | None) -> None:
        for path, adapter in tuner.adapters().items():
            for name, parameter in adapter.named_parameters():
                if parameter.grad is not None:
                    norm = parameter.grad.norm() / (1.0 if grad_scale is None else grad_scale)
                    key = f"{path}.{name}"
                    _AVERAGES[key] = 0.9 * _AVERAGES.get(key, norm) + 0.1 * norm
                    parameter.grad /= _AVERAGES[key] + 1e-6

    @hookimpl
    def tunerkit_state(self) -> State:
        return State(tensors={key: value.clone() for key, value in _AVERAGES.items()}, values={})

    @hookimpl
    def tunerkit_restore(self, state: State) -> None:
        _AVERAGES.clear()
        _AVERAGES.update(state.tensors)


@wrong("param_groups", what="finds its fast parameters by a part of a name")
class FastByName(Plugin):
    """Wants a higher rate for ``b``, and finds it by a part of its name that biases have too."""

    @hookimpl
    def tunerkit_param_groups(self, tuner: Tuner) -> list[ParamGroup]:
        return [ParamGroup([p for name, p in tuner.named_parameters() if ".b" in name], lr_scale=16.0)]


class NormsTheSecondDimension(Product):
    """Norms the dimension 1, which is the last one of (N, in) alone."""

    def added(self, x: Tensor) -> Tensor:
        h = x.to(self.a.dtype) @ self.a.T
        return h / (h.square().mean(dim=1, keepdim=True) + 1e-6).sqrt() @ self.b.T


@wrong("row_by_row", what="norms dim=1 instead of the last dimension")
class MixesTokens(Plugin):
    adapter = NormsTheSecondDimension

    @hookimpl
    def tunerkit_methods(self) -> list[Method]:
        return [Method(METHOD, config=LowRankConfig, targets="outputs")]


# --- Files and copies -------------------------------------------------------------------------------------------------


@wrong("other_ranks_load")
class HalfDeclared(Product):
    rank_dims: ClassVar[Mapping[str, int]] = {"a": 0}


@wrong("deepcopy")
class NeverCopied(Product):
    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


@wrong("offload")
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


@wrong("saves_and_loads", "scale of the adapter at '0' (1.0, now 4.0)")
class OtherScaleSettled(Plugin):
    """Where alpha is left out, an adapter is built with 1, and the settled config says 4."""

    @hookimpl
    def tunerkit_methods(self) -> list[Method]:
        return [Method(METHOD, config=SettledConfig)]

    @hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer, config: "SettledConfig") -> Adapter:  # type: ignore[override]
        return ScaledItself(base, config.rank, config.alpha or 1.0)

    @hookimpl
    def tunerkit_delta(self, adapter: "ScaledItself") -> Delta:  # type: ignore[override]
        return Delta(weight=adapter.scale * adapter.b @ adapter.a)


@attrs.frozen
class SettledConfig(LowRankConfig):
    alpha: float | None = setting(None, gt=0, doc="Numerator of the scale.")

    def settled(self) -> Self:
        return self if self.alpha is not None else attrs.evolve(self, alpha=4.0)


class ScaledItself(Product):
    def __init__(self, base: BaseLayer, rank: int, scale: float) -> None:
        super().__init__(base, rank)
        self.scale = scale

    def added(self, x: Tensor) -> Tensor:
        return super().added(x) * self.scale


class Signed(Product):
    """Draws signs after ``a``, of which fewer numbers are drawn while a file is loaded."""

    signs: Tensor

    def __init__(self, base: BaseLayer, rank: int, loading: bool) -> None:
        super().__init__(base, rank)
        torch.rand(0 if loading else 5)
        self.register_buffer("signs", torch.randn(rank), persistent=False)

    def added(self, x: Tensor) -> Tensor:
        return x.to(self.a.dtype) @ (self.signs.to(self.a)[:, None] * self.a).T @ self.b.T


@wrong("saves_and_loads", "no file has them: signs of the adapter at '0'")
class DrawsLessWhenLoading(Plugin):
    @hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer, config: LowRankConfig, loading: bool) -> Adapter:  # type: ignore[override]
        return Signed(base, config.rank, loading)

    @hookimpl
    def tunerkit_delta(self, adapter: Signed) -> Delta:  # type: ignore[override]
        return Delta(weight=adapter.b @ (adapter.signs[:, None] * adapter.a))


# --- Configs ----------------------------------------------------------------------------------------------------------


@wrong("config_round_trip")
@attrs.frozen
class CountingUp(LowRankConfig):
    rank: int = setting(2, ge=1, converter=lambda rank: rank + 1, doc="Larger at each reading.")


@wrong("bad_config_refused")
@attrs.frozen
class Lenient(LowRankConfig):
    rank: int = setting(2, converter=lambda rank: rank if type(rank) is int else 2, doc="Anything.")


@wrong("other_rank_setting")
@attrs.frozen
class Resetting(LowRankConfig):
    def settled(self) -> Self:
        return attrs.evolve(self, rank=2)


@wrong("config_round_trip", "settled() is not idempotent: called on what it returned, it changes rank")
@attrs.frozen
class Doubling(LowRankConfig):
    def settled(self) -> Self:
        return attrs.evolve(self, rank=2 * self.rank)


# --- What stays behind ------------------------------------------------------------------------------------------------


class ScaleOfTheClass(Product):
    scale: ClassVar[float] = 1.0

    def added(self, x: Tensor) -> Tensor:
        return super().added(x) * ScaleOfTheClass.scale


@attrs.frozen
class ScaledConfig(LowRankConfig):
    alpha: float = setting(2.0, gt=0, doc="Numerator of the scale.")


@wrong("trainings_do_not_meet", "one config's values are used by another adapter")
class LeaksItsScale(Plugin):
    """The scale of the adapter that was built last holds for all."""

    @hookimpl
    def tunerkit_methods(self) -> list[Method]:
        return [Method(METHOD, config=ScaledConfig)]

    @hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer, config: ScaledConfig) -> Adapter:  # type: ignore[override]
        ScaleOfTheClass.scale = config.alpha / config.rank
        return ScaleOfTheClass(base, config.rank)

    @hookimpl
    def tunerkit_delta(self, adapter: Product) -> Delta:
        return Delta(weight=ScaleOfTheClass.scale * adapter.b @ adapter.a)


class ScaleOfTheLayer(Product):
    def __init__(self, base: BaseLayer, rank: int, scale: float) -> None:
        super().__init__(base, rank)
        vars(base.module)["lora_scale"] = scale

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return y + (self.added(x) * vars(base.module)["lora_scale"]).to(y.dtype)


@wrong("trainings_do_not_meet", "nothing in the base's modules")
class LeaksThroughTheLayer(Plugin):
    @hookimpl
    def tunerkit_methods(self) -> list[Method]:
        return [Method(METHOD, config=ScaledConfig)]

    @hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer, config: ScaledConfig) -> Adapter:  # type: ignore[override]
        return ScaleOfTheLayer(base, config.rank, config.alpha / config.rank)

    @hookimpl
    def tunerkit_delta(self, adapter: Product, base: BaseLayer) -> Delta:  # type: ignore[override]
        return Delta(weight=vars(base.module)["lora_scale"] * adapter.b @ adapter.a)


_CALLS = [0]


@wrong("no_hidden_state", "plugins.testing.tests.bad_methods._CALLS[0] changed meanwhile")
class CountsInAGlobal(Product):
    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        _CALLS[0] += 1
        return y + self.added(x).to(y.dtype) * (1 + 0.01 * _CALLS[0])


_CACHE: dict[int, Tensor] = {}


@wrong("no_hidden_state", "keep nothing that is computed from weights")
class CachesInEval(Product):
    """Computes ΔW once for eval mode."""

    def train(self, mode: bool = True) -> Self:
        _CACHE.pop(id(self), None)
        return super().train(mode)

    def added(self, x: Tensor) -> Tensor:
        if self.training or torch.is_grad_enabled():
            return super().added(x)
        if id(self) not in _CACHE:
            _CACHE[id(self)] = self.b @ self.a
        return x.to(self.a.dtype) @ _CACHE[id(self)].to(self.a.dtype).T


@wrong("no_hidden_state", "keep nothing that is computed from weights")
class CachesByVersion(Product):
    """Computes ΔW again where a version counter changed, which ``.data`` passes by."""

    def added(self, x: Tensor) -> Tensor:
        if self.training or torch.is_grad_enabled():
            return super().added(x)
        key = hash((id(self), self.a._version, self.b._version))
        if key not in _CACHE:
            _CACHE[key] = self.b @ self.a
        return x.to(self.a.dtype) @ _CACHE[key].to(self.a.dtype).T


@wrong("random_state", "forward changes torch's mode of gradients")
class DisablesGradients(Product):
    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        if not self.training:
            torch.set_grad_enabled(False)
        return super().forward(base, x, y)


@wrong("random_state", "building adapters changes torch's precision of matrix products")
class SetsThePrecision(Plugin):
    @hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer, config: LowRankConfig) -> Adapter:
        torch.set_float32_matmul_precision("medium")
        return Product(base, config.rank)


@wrong("delta_gives_gradients", "leaves the adapter in eval mode")
class DeltaInEval(Plugin):
    @hookimpl
    def tunerkit_delta(self, adapter: Product) -> Delta:
        adapter.eval()
        return Delta(weight=adapter.b @ adapter.a)


@wrong("unwraps", "unwrap left the attribute 'is_adapted'")
class MarksTheLayer(Product):
    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        vars(base.module)["is_adapted"] = True


@wrong("row_by_row", "with an empty batch")
class NormedByTheBatch(Product):
    def added(self, x: Tensor) -> Tensor:
        return super().added(x) * (1 + 0 * x.abs().max())
