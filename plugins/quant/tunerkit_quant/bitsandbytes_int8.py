"""bitsandbytes' 8-bit linear layers."""

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, final

import attrs
import torch
from torch import Tensor

from tunerkit.plugin import Packing
from tunerkit_quant.packed import PackedLinear
from tunerkit_quant.shapes import miscount, misfit
from tunerkit_quant.versions import too_old


@final
@attrs.frozen(eq=False)
class BitsandbytesInt8Layer(PackedLinear):
    """``bitsandbytes.nn.Linear8bitLt`` with int8 weights.

    The integers and the scale of each row are attributes of the weight until the first forward, which moves them to
    ``module.state``.
    """

    forwards: ClassVar[tuple[str, ...]] = ("bitsandbytes.nn.modules.Linear8bitLt",)

    # Any: the attributes of bitsandbytes' classes.
    module: Any

    @property
    def packing(self) -> Packing:
        """int8."""
        return Packing("bitsandbytes int8", 8)

    def obstacle(self) -> str | None:
        """Weights in fp16, not quantised yet, or of another shape."""
        if self.module.state.has_fp16_weights:
            return "keeps its weight in fp16 and quantises it at each call: build it with has_fp16_weights=False"
        if self.module.weight.dtype != torch.int8 or self._scale() is None:
            return "holds no quantised weight yet: move the model to its device first, which quantises it"
        return (
            misfit(self, self.module.weight.shape)
            or miscount(self, "scales", self._scale().numel(), self.out_features)
            or too_old("bitsandbytes", (0, 45))
        )

    def dense(self) -> Tensor:
        """W as bitsandbytes dequantises it, in fp32."""
        from bitsandbytes.functional import int8_vectorwise_dequant

        found: Tensor = int8_vectorwise_dequant(self.module.weight.data, self._scale())
        return found

    def requantised(self, weight: Tensor) -> Mapping[str, object]:
        """An ``Int8Params`` before its first forward, and a ``state`` with the same settings."""
        from bitsandbytes.nn import Int8Params

        state = copy.copy(self.module.state)
        state.reset_grads()  # the integers and scales; the first forward moves the new ones there
        # Only a weight that comes from the CPU is quantised as it moves.
        new = Int8Params(weight.detach().cpu(), has_fp16_weights=False, requires_grad=False)
        return {"weight": new.to(self.module.weight.device), "state": state}

    def _scale(self) -> Any:
        moved = self.module.state.SCB
        return self.module.weight.SCB if moved is None else moved
