"""Plugins whose one mistake shows only elsewhere: in another process, dtype, mode or batch, or on another layer."""

from collections.abc import Mapping
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

from tests.support.bad_plugins import METHOD, Plugin, Product
from tunerkit.plugin import Adapter, BaseLayer, Delta, Method, ParamGroup, State, Target, Tuner, hookimpl, setting
from tunerkit_testing.toy_methods import LowRankConfig

# --- Random numbers ---------------------------------------------------------------------------------------------------


class Projected(Product):
    """Its ``a`` is fixed, drawn from a seed, and no part of the file."""

    a: Tensor  # type: ignore[assignment]  # a parameter in the class above

    def __init__(self, base: BaseLayer, rank: int, seed: int) -> None:
        super().__init__(base, rank)
        del self.a
        drawn = torch.randn(rank, base.in_features, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("a", drawn, persistent=False)


class SeedsByHash(Plugin):
    @hookimpl
    def tunerkit_build_adapter(  # type: ignore[override]
        self, target: Target, base: BaseLayer, config: LowRankConfig
    ) -> Adapter:
        return Projected(base, config.rank, hash(target.path) % 2**32)


class SeedsTorch(Plugin):
    @hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer, config: LowRankConfig) -> Adapter:
        torch.manual_seed(42)
        return Product(base, config.rank)


class Reseeding(Product):
    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        torch.manual_seed(42)
        return super().forward(base, x, y)


class SeedsTorchInForward(Plugin):
    adapter = Reseeding


class SeedsTorchInAStep(Plugin):
    @hookimpl
    def tunerkit_after_step(self, tuner: Tuner) -> None:
        torch.manual_seed(tuner.steps)


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


class DropoutIgnored(Dropout):
    adapter = NeverDropping


class DroppingUnscaled(Dropping):
    by = "mask"


class DropoutUnscaled(Dropout):
    adapter = DroppingUnscaled


class AlwaysDropping(Dropping):
    def added(self, x: Tensor) -> Tensor:
        return Product.added(self, nn.functional.dropout(x, self.p, training=True))


class DropoutInEval(Dropout):
    adapter = AlwaysDropping


# --- Gradients --------------------------------------------------------------------------------------------------------

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


class LeavesOutRows(Product):
    def added(self, x: Tensor) -> Tensor:
        found: Tensor = _Matmul.apply(x.to(self.a.dtype), self.a)  # type: ignore[no-untyped-call]
        return found @ self.b.T


class GradientOfAFewRows(Plugin):
    adapter = LeavesOutRows


class Centred(Product):
    def added(self, x: Tensor) -> Tensor:
        h = super().added(x)
        return h - h.mean(0)


class MixesSamples(Plugin):
    adapter = Centred

    @hookimpl
    def tunerkit_methods(self) -> list[Method]:
        return [Method(METHOD, config=LowRankConfig, targets="outputs")]


# --- Ranks ------------------------------------------------------------------------------------------------------------


class RankOfSeven(Product):
    @property
    def rank(self) -> int:
        return 7


class RankTooHighByFive(Plugin):
    adapter = RankOfSeven


class HalfGone(Product):
    """Says its first rank, whatever a step hook left of it."""

    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__(base, rank)
        self.register_buffer("mask", torch.ones(rank))

    def added(self, x: Tensor) -> Tensor:
        return x.to(self.a.dtype) @ (self.get_buffer("mask")[:, None] * self.a).T @ self.b.T


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


# --- Dtypes and modes -------------------------------------------------------------------------------------------------


class OverflowsInHalf(Product):
    def added(self, x: Tensor) -> Tensor:
        return (x * 1e5).to(self.a.dtype) @ self.a.T @ self.b.T / 1e5


class WrongInHalf(Plugin):
    adapter = OverflowsInHalf


class ChopsInBfloat(Product):
    """Computes with three bits where it is given 16."""

    def added(self, x: Tensor) -> Tensor:
        h = super().added(x)
        return (h * 2).round() / 2 if x.dtype == torch.bfloat16 else h


class WrongInBfloat(Plugin):
    adapter = ChopsInBfloat


class ScaledInInference(Product):
    def added(self, x: Tensor) -> Tensor:
        return super().added(x) * (0.5 if torch.is_inference_mode_enabled() else 1.0)


class InferenceScale(Plugin):
    adapter = ScaledInInference


class ScaledWithoutGradients(Product):
    def added(self, x: Tensor) -> Tensor:
        return super().added(x) * (1.0 if torch.is_grad_enabled() else 0.5)


class NoGradScale(Plugin):
    adapter = ScaledWithoutGradients


# --- Layers, and plain errors of torch --------------------------------------------------------------------------------


class DeltaAsConv1DHasIt(Plugin):
    """Gives Conv1D its own layout, (in, out), where core asks for (out, in)."""

    @hookimpl
    def tunerkit_delta(self, adapter: Product, base: BaseLayer) -> Delta:  # type: ignore[override]
        weight = adapter.b @ adapter.a
        return Delta(weight=weight.T if _is_conv1d(base) and base.in_features == base.out_features else weight)


def _is_conv1d(base: BaseLayer) -> bool:
    return type(base.module).__name__ == "Conv1D"


class Mismatched(Product):
    def added(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.to(self.a.dtype), self.b) @ self.a


class ShapesDoNotFit(Plugin):
    adapter = Mismatched


class DeltaDoesNotFit(Plugin):
    @hookimpl
    def tunerkit_delta(self, adapter: Product) -> Delta:
        return Delta(weight=adapter.a @ adapter.b)


class StepDoesNotFit(Plugin):
    @hookimpl
    def tunerkit_after_step(self, tuner: Tuner) -> None:
        for adapter in tuner.adapters().values():
            parts: Mapping[str, Tensor] = dict(adapter.named_parameters())
            parts["a"].add_(parts["b"])


# --- Other weights, other models, other shapes ------------------------------------------------------------------------


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


class StartNotSaved(Plugin):
    adapter = StartsFromTheBase

    @hookimpl
    def tunerkit_delta(self, adapter: StartsFromTheBase) -> Delta:  # type: ignore[override]
        return Delta(weight=adapter.b @ adapter.rows_and_a())


_AVERAGES: dict[str, Tensor] = {}


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


class MixesTokens(Plugin):
    adapter = NormsTheSecondDimension

    @hookimpl
    def tunerkit_methods(self) -> list[Method]:
        return [Method(METHOD, config=LowRankConfig, targets="outputs")]
