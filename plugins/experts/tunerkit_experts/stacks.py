"""Stacks: the child modules that stand for stacked weights of experts, and their base-layer kind."""

from collections.abc import Sequence
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from tunerkit.plugin import AdapterError, BaseLayer
from tunerkit_experts.recomputed import recomputed
from tunerkit_experts.routes import Route, multiply, one_by_one
from tunerkit_experts.transformers_private import batched_linear, grouped_linear

NAME = "stacks"  # of the child of an experts module
PACK = (
    "To have them in 4 bits, call bitsandbytes.nn.parametrize.replace_parameter_4bit(experts, name, quant_type='nf4') "
    "for each stack before you wrap the model"
)


class Stack(nn.Module):
    """A child without parameters that computes the product with one stacked weight of its owner.

    Attributes:
        name: The name of the owner's parameter, whose bias has the name ``f"{name}_bias"``.
        is_transposed: Whether the parameter is (E, in, out) instead of (E, out, in).
        in_features: The features of a row.
        out_features: The features of its output.
        count: E, the number of experts.
        sizes: The shape of the parameter.
        route: The route of the rows, while a forward runs; else None.
    """

    def __init__(self, owner: nn.Module, name: str, *, is_transposed: bool) -> None:
        super().__init__()
        self.sizes: Sequence[int] = getattr(owner, name).shape
        self.count, *sizes = self.sizes
        self.out_features, self.in_features = reversed(sizes) if is_transposed else sizes
        self.name, self.is_transposed = name, is_transposed
        self.route: Route | None = None
        vars(self)["owner"] = owner  # not a child, which would make a circle

    @property
    def owner(self) -> nn.Module:
        """The module that has the parameter."""
        found: nn.Module = vars(self)["owner"]
        return found

    def multiply(self, owner: nn.Module, rows: Tensor, route: Route) -> Tensor:
        """Call this module for ``rows`` (N, in) of ``route``, with the weight that ``owner`` has now."""
        self.route = route
        try:
            product: Tensor = self(rows, getattr(owner, self.name), getattr(owner, f"{self.name}_bias", None))
        finally:
            self.route = None
        return product

    def forward(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply the rows by their experts' matrices, and add the bias, as transformers does: (N, out)."""
        with recomputed(self.owner, self.name, weight):
            return self._product(rows, weight, bias)

    def _product(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        route = self.route
        assert route is not None
        if route.form == "grouped_mm":
            added = None if bias is None else bias[route.ids]
            return grouped_linear(rows, weight, route.ends, added, is_transposed=self.is_transposed)
        if route.form == "batched_mm":
            added = None if bias is None else bias[route.ids]
            return batched_linear(rows, weight[route.ids], added, is_transposed=self.is_transposed)
        product = one_by_one(rows, weight.mT if self.is_transposed else weight, route)
        return product if bias is None else product + bias[route.ids]

    def extra_repr(self) -> str:
        return f"{self.count} x ({self.out_features}, {self.in_features})"


@attrs.frozen(eq=False)
class StackLayer(BaseLayer):
    """The base-layer kind of a `Stack`: W (E, out, in) is the parameter of its owner."""

    forwards: ClassVar[tuple[str, ...]] = (f"{Stack.__module__}.{Stack.__qualname__}",)

    module: Stack

    @property
    def weight_name(self) -> str:  # type: ignore[override]  # the same name for all modules of other kinds
        return self.module.name

    @property
    def bias_name(self) -> str:  # type: ignore[override]  # as above
        return f"{self.module.name}_bias"

    @property
    def holder(self) -> nn.Module:
        return self.module.owner

    @property
    def stack(self) -> int:
        return self._sizes[0]

    @property
    def in_features(self) -> int:
        return self._sizes[1 if self.module.is_transposed else 2]

    @property
    def out_features(self) -> int:
        return self._sizes[2 if self.module.is_transposed else 1]

    @property
    def _sizes(self) -> Sequence[int]:
        """The shape of the parameter now; as it was if it is computed, which would unpack it, or emptied by ZeRO-3."""
        own = None if self._is_computed else self.tensor(self.weight_name)
        return self.module.sizes if own is None or not own.numel() else own.shape

    def obstacle(self) -> str | None:
        owner = self.module.owner
        if getattr(owner, "_is_expert_parallel", False):
            return "is sharded by expert parallelism, which adapters do not support; load the model without it"
        if not self._is_computed and is_packed(self.tensor(self.weight_name)):
            return (
                "is a stack that a quantizer has packed in a way that adapters do not support; load the experts in "
                f"full precision. {PACK}"
            )
        return None

    def project_in(self, x: Tensor, q: Tensor, dropout: float = 0.0) -> Tensor:
        """Compute Q x with each row's own Q: (N, in) to (N, r)."""
        _refuse_partitioned(q, x)
        return multiply(F.dropout(x, dropout) if dropout > 0 else x, q, self._route())

    def project_out(self, h: Tensor, p: Tensor) -> Tensor:
        """Compute P h with each row's own P: (N, r) to (N, out)."""
        return multiply(h, p, self._route())

    def shape_bias(self, b: Tensor) -> Tensor:
        """Choose each row's own b: (E, out) to (N, out)."""
        return b[self._route().ids]

    def bias(self) -> Tensor | None:
        """Read the experts' biases, (E, out)."""
        found: Tensor | None = getattr(self.holder, self.bias_name, None)
        return None if found is None else found.detach()

    def dense(self) -> Tensor:
        found = getattr(self.holder, self.weight_name) if self._is_computed else self.tensor(self.weight_name)
        weight: Tensor = found.detach()
        return weight.mT if self.module.is_transposed else weight

    def pack(self, weight: Tensor) -> Tensor:
        """Transpose each matrix, if the parameter is (E, in, out)."""
        return weight.mT if self.module.is_transposed else weight

    def merged(self, delta: Tensor) -> dict[str, Any]:
        """As for other layers; raises `AdapterError` for a stack in 4 bits, which cannot be written."""
        if self._is_computed:
            raise AdapterError(
                "its weight is computed from another one (a parametrization), as that of a stack in 4 bits is, and "
                "cannot be written. Load the adapter onto the base in full precision, and merge there"
            )
        return super().merged(delta)

    @property
    def _is_computed(self) -> bool:
        """Whether W is torch's parametrization of another tensor, such as bitsandbytes' packed stacks."""
        return is_parametrized(self.holder, self.weight_name)

    def _route(self) -> Route:
        if self.module.route is None:
            raise AdapterError("a stack of experts has no rows outside a forward of its owner")
        return self.module.route


def _refuse_partitioned(factor: Tensor, rows: Tensor) -> None:
    """Raise `AdapterError` if ZeRO-3 would empty the factor before the backward pass of this forward.

    DeepSpeed gathers a module's weights for the backward pass only where an input of the module has a gradient.
    """
    if hasattr(factor, "ds_id") and torch.is_grad_enabled() and not rows.requires_grad:
        raise AdapterError(
            "ZeRO-3 of DeepSpeed trains a stack of experts only if its input has a gradient, and nothing before this "
            "one is trained: call model.enable_input_require_grads() before training"
        )


def is_packed(weight: Tensor) -> bool:
    """Whether a parameter has integers or 8-bit floats, or is of a quantizer's class of tensors."""
    is_made_of_others = hasattr(type(weight), "__tensor_flatten__") and not hasattr(weight, "placements")  # a DTensor
    return is_made_of_others or not weight.is_floating_point() or weight.element_size() == 1
