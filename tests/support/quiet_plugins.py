"""Plugins whose one mistake shows late, or only beside another adapter, another config, or other weights."""

from typing import Any, ClassVar, Self

import attrs
import torch
from torch import Tensor, nn

from tests.support.bad_plugins import METHOD, NeedsSteps, Plugin, Product, own
from tests.support.subtle_plugins import with_adapter, with_config
from tunerkit.plugin import Adapter, BaseLayer, Delta, Method, Tuner, hookimpl, optimizer_of, setting
from tunerkit_testing.toy_methods import LowRankConfig

# --- The base ---------------------------------------------------------------------------------------------------------


class CentresTheBase(Product):
    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        weight = base.module.get_parameter("weight")
        with torch.no_grad():
            weight.sub_(weight.mean())
        return super().forward(base, x, y)


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


class DeltaOfTheLiveWeight(Plugin):
    adapter = ReadsTheWeight

    @hookimpl
    def tunerkit_delta(self, adapter: ReadsTheWeight, base: BaseLayer) -> Delta:  # type: ignore[override]
        weight = base.module.get_parameter("weight")
        return Delta(weight=adapter.b @ adapter.a @ weight.to(adapter.a.dtype))


class ForwardOfTheLiveWeight(Plugin):
    adapter = ReadsTheLiveWeight

    @hookimpl
    def tunerkit_delta(self, adapter: ReadsTheWeight, base: BaseLayer) -> Delta:  # type: ignore[override]
        return Delta(weight=adapter.b @ adapter.a @ base.dense().to(adapter.a.dtype))


# --- Dtypes, layouts and places ---------------------------------------------------------------------------------------


class WrongInItsOwnHalf(Product):
    def added(self, x: Tensor) -> Tensor:
        return super().added(x) * (2 if self.a.dtype == torch.bfloat16 else 1)


class DeltaWrongInHalf(Plugin):
    @hookimpl
    def tunerkit_delta(self, adapter: Product) -> Delta:
        return Delta(weight=adapter.b @ adapter.a * (2 if adapter.a.dtype == torch.float16 else 1))


class Viewing(Product):
    def added(self, x: Tensor) -> Tensor:
        rows = x.view(-1, x.shape[-1]).to(self.a.dtype)
        return (rows @ self.a.T @ self.b.T).view(*x.shape[:-1], -1)


class ViewsY(Product):
    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return (y.view(-1, y.shape[-1]) + self.added(x).to(y.dtype).reshape(-1, y.shape[-1])).view(y.shape)


class PlainTensor(Product):
    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        self.gains = {"out": torch.full((base.out_features,), 2.0)}

    def added(self, x: Tensor) -> Tensor:
        return super().added(x) * self.gains["out"].to(self.a.dtype)


class HoldsATensor(Plugin):
    adapter = PlainTensor

    @hookimpl
    def tunerkit_delta(self, adapter: PlainTensor) -> Delta:  # type: ignore[override]
        return Delta(weight=adapter.gains["out"].to(adapter.a.dtype)[:, None] * (adapter.b @ adapter.a))


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


class GuardsTooSmall(Product):
    def added(self, x: Tensor) -> Tensor:
        return x.to(self.a.dtype) @ self.a.T @ (self.b / (self.b.norm(dim=0, keepdim=True) + 1e-8)).T


_TWOS = torch.full((6,), 2.0)


class UsesAGlobalTensor(Product):
    def added(self, x: Tensor) -> Tensor:
        return super().added(x) * _TWOS.to(self.a.dtype)


class HoldsAGlobalTensor(Plugin):
    adapter = UsesAGlobalTensor

    @hookimpl
    def tunerkit_delta(self, adapter: Product) -> Delta:
        return Delta(weight=_TWOS.to(adapter.a.dtype)[:, None] * (adapter.b @ adapter.a))


class MakesOnTheCpu(Product):
    def added(self, x: Tensor) -> Tensor:
        return super().added(x) * torch.ones(self.b.shape[0], dtype=self.a.dtype)


# --- Seeds ------------------------------------------------------------------------------------------------------------


class SeedsItself(Product):
    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        nn.init.normal_(self.a, generator=torch.Generator().manual_seed(0))


class CountedAtBuild(Product):
    built: ClassVar[int] = 0

    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        type(self).built += 1
        self.a.data.add_(type(self).built)


_GENERATOR = torch.Generator().manual_seed(0)


class DrawsOn(Product):
    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        nn.init.normal_(self.a, generator=_GENERATOR)


# --- Values that outlive an adapter -----------------------------------------------------------------------------------


class ScaleOfTheClass(Product):
    scale: ClassVar[float] = 1.0

    def added(self, x: Tensor) -> Tensor:
        return super().added(x) * ScaleOfTheClass.scale


@attrs.frozen
class ScaledConfig(LowRankConfig):
    alpha: float = setting(2.0, gt=0, doc="Numerator of the scale.")


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


class CountsInAGlobal(Product):
    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        _CALLS[0] += 1
        return y + self.added(x).to(y.dtype) * (1 + 0.01 * _CALLS[0])


_CACHE: dict[int, Tensor] = {}


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


class CachesByVersion(Product):
    """Computes ΔW again where a version counter changed, which ``.data`` passes by."""

    def added(self, x: Tensor) -> Tensor:
        if self.training or torch.is_grad_enabled():
            return super().added(x)
        key = hash((id(self), self.a._version, self.b._version))
        if key not in _CACHE:
            _CACHE[key] = self.b @ self.a
        return x.to(self.a.dtype) @ _CACHE[key].to(self.a.dtype).T


# --- Files ------------------------------------------------------------------------------------------------------------


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


class DrawsLessWhenLoading(Plugin):
    @hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer, config: LowRankConfig, loading: bool) -> Adapter:  # type: ignore[override]
        return Signed(base, config.rank, loading)

    @hookimpl
    def tunerkit_delta(self, adapter: Signed) -> Delta:  # type: ignore[override]
        return Delta(weight=adapter.b @ (adapter.signs[:, None] * adapter.a))


# --- Ranks and deltas -------------------------------------------------------------------------------------------------


class LeavesOutARank(Product):
    rank_dims: ClassVar[dict[str, int]] = {"a": 0, "b": 1}

    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        self.gains = nn.Parameter(torch.ones(rank))

    def added(self, x: Tensor) -> Tensor:
        return x.to(self.a.dtype) @ self.a.T @ (self.b * self.gains).T


class LeavesItOut(Plugin):
    adapter = LeavesOutARank

    @hookimpl
    def tunerkit_delta(self, adapter: LeavesOutARank) -> Delta:  # type: ignore[override]
        return Delta(weight=(adapter.b * adapter.gains) @ adapter.a)


class Shifts(Product):
    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        self.shift = nn.Parameter(torch.zeros(base.out_features))

    def added(self, x: Tensor) -> Tensor:
        return super().added(x) + self.shift


# --- Steps ------------------------------------------------------------------------------------------------------------


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


class UnsavedCounterOfTheAdapter(UnsavedCounter):
    @hookimpl
    def tunerkit_after_step(self, tuner: Tuner) -> None:
        for adapter in tuner.adapters().values():
            vars(adapter)["count"] = vars(adapter).get("count", 0) + 1
            if vars(adapter)["count"] % 4 == 0:
                for parameter in adapter.parameters():
                    parameter.mul_(0.99)


class PenaltyOnAll(NeedsSteps):
    """Weight decay as a gradient, also for the head that is trained in full."""

    @hookimpl
    def tunerkit_before_step(self, tuner: Tuner, grad_scale: Tensor | None) -> None:
        for parameter in tuner.parameters():
            if parameter.grad is not None:
                parameter.grad.add_(0.01 * parameter.detach() * (1.0 if grad_scale is None else grad_scale))


class DecaysAll(Plugin):
    """Weight decay after the step, also of the head."""

    @hookimpl
    def tunerkit_after_step(self, tuner: Tuner) -> None:
        for parameter in tuner.parameters():
            parameter.mul_(0.999)


class ForgetsNeedsSteps(Plugin):
    """Norms each row of ``a`` after a step."""

    @hookimpl
    def tunerkit_after_step(self, tuner: Tuner) -> None:
        for adapter in tuner.adapters().values():
            a = adapter.get_parameter("a")
            a.div_(a.norm(dim=1, keepdim=True))


class ReplacesAParameter(NeedsSteps):
    @hookimpl
    def tunerkit_after_step(self, tuner: Tuner, step: int) -> None:
        if step == 6:
            for adapter in tuner.adapters().values():
                vars(adapter)["_parameters"]["b"] = nn.Parameter(adapter.get_parameter("b").detach() * 0.99)


class ReplacesItLate(ReplacesAParameter):
    @hookimpl
    def tunerkit_after_step(self, tuner: Tuner, step: int) -> None:
        super().tunerkit_after_step(tuner, step - 40)


class ReplacesItMuchLater(ReplacesAParameter):
    @hookimpl
    def tunerkit_after_step(self, tuner: Tuner, step: int) -> None:
        super().tunerkit_after_step(tuner, step - 100)


class LowersTheRate(NeedsSteps):
    @hookimpl
    def tunerkit_after_step(self, tuner: Tuner) -> None:
        optimizer = optimizer_of(tuner)
        assert optimizer is not None
        for group in optimizer.param_groups:
            group["lr"] = 0.9 * group["lr"] + 1e-6


class AsksEveryGradient(NeedsSteps):
    @hookimpl
    def tunerkit_before_step(self, tuner: Tuner) -> None:
        for parameter in own(tuner):
            parameter.grad.mul_(1)  # type: ignore[union-attr]  # the mistake


class NormsItselfInForward(Product):
    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        self.a.data.div_(self.a.data.norm(dim=1, keepdim=True))
        return super().forward(base, x, y)


class HooksTheLayer(Product):
    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        base.module.register_forward_hook(lambda module, args, output: None)


# --- Configs ----------------------------------------------------------------------------------------------------------


@attrs.frozen
class Doubling(LowRankConfig):
    def settled(self) -> Self:
        return attrs.evolve(self, rank=2 * self.rank)


# --- What a block or a hook leaves behind -----------------------------------------------------------------------------


class DisablesGradients(Product):
    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        if not self.training:
            torch.set_grad_enabled(False)
        return super().forward(base, x, y)


class SetsThePrecision(Plugin):
    @hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer, config: LowRankConfig) -> Adapter:
        torch.set_float32_matmul_precision("medium")
        return Product(base, config.rank)


class DeltaInEval(Plugin):
    @hookimpl
    def tunerkit_delta(self, adapter: Product) -> Delta:
        adapter.eval()
        return Delta(weight=adapter.b @ adapter.a)


class MarksTheLayer(Product):
    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        vars(base.module)["is_adapted"] = True


class NormedByTheBatch(Product):
    def added(self, x: Tensor) -> Tensor:
        return super().added(x) * (1 + 0 * x.abs().max())


# The check that must fail, the plugin that it must fail for, and what its sentence must say of the cause.
QUIET: tuple[tuple[str, type, str], ...] = (
    (
        "config_round_trip",
        with_config(Doubling),
        "settled() is not idempotent: called on what it returned, it changes rank",
    ),
    ("forward_runs", with_adapter(CentresTheBase), "forward wrote into the base's weight"),
    ("forward_runs", with_adapter(BorrowsTheBase), "forward wrote into the base's weight"),
    ("offload", DeltaOfTheLiveWeight, "the delta is computed from the live weights of base.module"),
    ("offload", ForwardOfTheLiveWeight, "forward is computed from the live weights of base.module"),
    ("half_precision", with_adapter(WrongInItsOwnHalf), "with adapters in torch.bfloat16, the output differs"),
    ("half_precision", DeltaWrongInHalf, "with adapters in torch.float16, the output with the delta differs"),
    ("autocast", with_adapter(RoundsUnderAutocast), "autocast_off(x.device)"),
    ("half_precision", with_adapter(GuardsTooSmall), "in torch.float16, the first output is NaN or inf"),
    ("saves_and_loads", OtherScaleSettled, "scale of the adapter at '0' (1.0, now 4.0)"),
    ("saves_and_loads", DrawsLessWhenLoading, "no file has them: signs of the adapter at '0'"),
    ("rank", LeavesItOut, "rank_dims leaves out gains"),
    ("delta_is_what_forward_adds", with_adapter(Shifts), "the delta lacks a bias"),
    ("row_by_row", with_adapter(Viewing), "that are not contiguous, forward raised RuntimeError"),
    ("row_by_row", with_adapter(ViewsY), "use reshape or flatten in place of view"),
    ("row_by_row", with_adapter(NormedByTheBatch), "with an empty batch"),
    ("device", HoldsATensor, "gains['out'] is a tensor that is neither a parameter nor a buffer"),
    ("device", HoldsAGlobalTensor, "use no tensor there that is neither an argument, a parameter nor a buffer"),
    ("device", with_adapter(MakesOnTheCpu), "make new ones with device=x.device"),
    ("seed", with_adapter(SeedsItself), "a generator with a fixed seed"),
    ("seed", with_adapter(CountedAtBuild), "CountedAtBuild.built changed meanwhile"),
    ("seed", with_adapter(DrawsOn), "no generator that goes on from one adapter to the next"),
    ("trainings_do_not_meet", LeaksItsScale, "one config's values are used by another adapter"),
    ("trainings_do_not_meet", LeaksThroughTheLayer, "nothing in the base's modules"),
    ("no_hidden_state", with_adapter(CountsInAGlobal), "tests.support.quiet_plugins._CALLS[0] changed meanwhile"),
    ("no_hidden_state", with_adapter(CachesInEval), "keep nothing that is computed from weights"),
    ("no_hidden_state", with_adapter(CachesByVersion), "keep nothing that is computed from weights"),
    ("resumes", UnsavedCounter, "After load_state these were others than at save_state: tuner.state['count']"),
    ("resumes", UnsavedCounterOfTheAdapter, "than at save_state: count of the adapter at '0'"),
    ("resumes_late", LateAverage, "than at save_state: tuner.state[0]"),
    ("resumes_late", ReplacesItLate, "is another nn.Parameter than the optimizer was given"),
    ("resumes_late", ReplacesItMuchLater, "is another nn.Parameter than the optimizer was given"),
    ("every_tensor_moves", ReplacesAParameter, "is another nn.Parameter than the optimizer was given"),
    ("trains_beside_copies", PenaltyOnAll, "a step hook changes gradient of 0.bias, which is not the method's"),
    ("trains_beside_copies", DecaysAll, "a step hook changes 0.bias, which is not the method's"),
    ("trains_beside_copies", LowersTheRate, "a step hook changes the optimizer's lr"),
    ("trains_beside_copies", AsksEveryGradient, "in a step in which a target has no gradient"),
    ("no_hidden_state", with_adapter(NormsItselfInForward), "forward changed a of the adapter"),
    ("unwraps", with_adapter(HooksTheLayer), "unwrap left forward_hooks in the module"),
    ("needs_steps", ForgetsNeedsSteps, "declare Method(..., needs_steps=True)"),
    ("random_state", with_adapter(DisablesGradients), "forward changes torch's mode of gradients"),
    ("random_state", SetsThePrecision, "building adapters changes torch's precision of matrix products"),
    ("delta_gives_gradients", DeltaInEval, "leaves the adapter in eval mode"),
    ("unwraps", with_adapter(MarksTheLayer), "unwrap left the attribute 'is_adapted'"),
)
