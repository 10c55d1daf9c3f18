"""optimum-quanto's linear layers."""

from collections.abc import Mapping
from typing import Any, ClassVar, final

import attrs
from torch import Tensor, nn

from tunerkit.plugin import Packing
from tunerkit_quant.packed import PackedLinear
from tunerkit_quant.shapes import misfit
from tunerkit_quant.versions import too_old


@final
@attrs.frozen(eq=False)
class QuantoLayer(PackedLinear):
    """``QLinear`` after ``optimum.quanto.freeze``."""

    forwards: ClassVar[tuple[str, ...]] = ("optimum.quanto.nn.qlinear.QLinear",)

    # Any: the attributes of quanto's class.
    module: Any

    @property
    def packing(self) -> Packing:
        """The name of the dtype, such as qint8."""
        kind = self.module.weight_qtype
        return Packing("quanto none", 32) if kind is None else Packing(f"quanto {kind.name}", kind.bits)

    def obstacle(self) -> str | None:
        """A layer that is not frozen, that quantises its activations, or whose weight has another shape."""
        if self.module.activation_qtype is not None:
            return "quantises its input and its output too: call optimum.quanto.quantize without activations"
        if not self.module.frozen:
            return "quantises its weight at each call: call optimum.quanto.freeze(model) first"
        return misfit(self, self.module.weight.shape) or too_old("optimum-quanto", (0, 2, 6))

    def dense(self) -> Tensor:
        """W as quanto dequantises it."""
        found: Tensor = self.module.weight.dequantize()
        return found.detach()

    def requantised(self, weight: Tensor) -> Mapping[str, object]:
        """The weight of another layer that quanto makes with the same settings."""
        own = self.module
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight.detach().to(own.weight.dtype), requires_grad=False)
        new = type(own).from_module(linear, weights=own.weight_qtype, optimizer=own.optimizer)
        return {"weight": nn.Parameter(new.qweight, requires_grad=False)}
