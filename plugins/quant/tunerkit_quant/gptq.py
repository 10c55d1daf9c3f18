"""GPTQModel's linear layers of the GPTQ method."""

from typing import Any, ClassVar, final

import attrs
from torch import Tensor, nn

from tunerkit.plugin import Packing, forward_name
from tunerkit_quant.packed import PackedLinear
from tunerkit_quant.shapes import misfit
from tunerkit_quant.versions import too_old

_KERNELS = "gptqmodel.nn_modules.qlinear."
_TRAINABLE = f"{_KERNELS}torch.TorchLinear"


@final
@attrs.frozen(eq=False)
class GptqLayer(PackedLinear):
    """``TorchLinear``, the kernel that passes gradients. GPTQ needs data to quantise, so nothing is merged into it.

    Its bias is a buffer, so it is not trained.
    """

    forwards: ClassVar[tuple[str, ...]] = (_KERNELS,)
    weight_name: ClassVar[str] = "qweight"

    # Any: the attributes of GPTQModel's class.
    module: Any

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether the forward is that of a kernel of GPTQModel, and the module holds GPTQ's packed weight."""
        return super().matches(module) and hasattr(module, "qweight") and hasattr(module, "g_idx")

    @property
    def packing(self) -> Packing:
        """The number of bits."""
        return Packing(f"GPTQ int{self.module.bits}", self.module.bits)

    def obstacle(self) -> str | None:
        """A kernel without a backward, or a weight that is packed for another shape."""
        if forward_name(self.module) != _TRAINABLE:
            return (
                f"runs GPTQModel's kernel {type(self.module).__name__}, through which no gradient is known to pass: "
                "load the model with backend=BACKEND.GPTQ_TORCH"
            )
        packed = self.module.qweight  # (in bits / the bits of its dtype, out)
        columns = packed.shape[0] * packed.element_size() * 8 // self.module.bits
        return misfit(self, (packed.shape[1], columns)) or too_old("gptqmodel", (5,))

    def dense(self) -> Tensor:
        """W as GPTQModel dequantises it, in the dtype of its scales."""
        groups = self.module.g_idx.shape[0] // self.in_features
        found: Tensor = self.module.dequantize_weight(num_itr=groups)  # (in, out)
        return found.t().detach()

    def bias(self) -> Tensor | None:
        """The bias, which is a buffer."""
        found: Tensor | None = self.module.bias
        return None if found is None else found.detach()
