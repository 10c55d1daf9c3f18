"""HQQ's linear layers."""

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
class HqqLayer(PackedLinear):
    """``HQQLinear``: packed integers in the parameter ``W_q``, what they mean in the dict ``meta``.

    Its bias is no parameter, so it is not trained.
    """

    forwards: ClassVar[tuple[str, ...]] = ("hqq.core.quantize.HQQLinear",)
    weight_name: ClassVar[str] = "W_q"

    # Any: the attributes of HQQ's class.
    module: Any

    @property
    def packing(self) -> Packing:
        """The number of bits; unknown before it is quantised, which is an `obstacle`."""
        bits = (self.module.meta or {}).get("nbits", 8)
        return Packing(f"HQQ int{bits:g}", bits)

    def obstacle(self) -> str | None:
        """A layer that is not quantised yet, or whose weight is packed for another shape."""
        if not self.module.is_initialized():
            return "holds no quantised weight yet: call its initialize(), or load it"
        return misfit(self, self.module.meta["shape"]) or too_old("hqq", (0, 2))

    def dense(self) -> Tensor:
        """W as HQQ dequantises it, in its compute dtype."""
        found: Tensor = self.module.dequantize()
        return found.detach()

    def bias(self) -> Tensor | None:
        """The bias, which is an attribute of the module and no parameter."""
        found: Tensor | None = self.module.bias
        return None if found is None else found.detach()

    def requantised(self, weight: Tensor) -> Mapping[str, object]:
        """The packed integers and the ``meta`` of another layer with the same settings."""
        config = {**self.module.quant_config, "offload_meta": self.module.offload_meta}
        new = type(self.module).from_weights(
            weight.detach(), None, config, compute_dtype=self.module.compute_dtype, device=self.module.device
        )
        return {"W_q": nn.Parameter(new.W_q.data, requires_grad=False), "meta": new.meta}
