"""bitsandbytes' 4-bit linear layers, nf4 and fp4."""

from collections.abc import Mapping
from typing import Any, ClassVar, final

import attrs
from torch import Tensor, nn

from tunerkit.plugin import Packing
from tunerkit_quant.packed import PackedLinear
from tunerkit_quant.shapes import miscount, misfit
from tunerkit_quant.versions import too_old

# On a CPU with AVX512-BF16, a forward in eval mode repacks the weight if this attribute is set, and ends all gradients
# silently. Its earlier value is kept in the module, so that a deep copy has its own.
_REPACKS, _EARLIER = "support_avx512bf16_for_cpu", "_tunerkit_support_avx512bf16_for_cpu"


def forbid_repacking_(model: nn.Module) -> None:
    """Keep every 4-bit layer of a model as it is, adapted or not: gradients must pass it."""
    for module in model.modules():
        if hasattr(module, _REPACKS) and Bitsandbytes4BitLayer.matches(module):
            vars(module).setdefault(_EARLIER, getattr(module, _REPACKS))
            setattr(module, _REPACKS, False)


def allow_repacking_(model: nn.Module) -> None:
    """Undo `forbid_repacking_`."""
    for module in model.modules():
        if _EARLIER in vars(module):
            setattr(module, _REPACKS, vars(module).pop(_EARLIER))


@final
@attrs.frozen(eq=False)
class Bitsandbytes4BitLayer(PackedLinear):
    """``bitsandbytes.nn.Linear4bit``, whose weight is a ``Params4bit`` with its scales in a ``quant_state``."""

    forwards: ClassVar[tuple[str, ...]] = ("bitsandbytes.nn.modules.Linear4bit",)

    # Any: the attributes of bitsandbytes' classes.
    module: Any

    @property
    def packing(self) -> Packing:
        """nf4 or fp4."""
        state = self._state()  # kept by the module too: the weight is a DTensor where FSDP2 shards it
        return Packing(f"bitsandbytes {(self.module.weight if state is None else state).quant_type}", 4)

    def obstacle(self) -> str | None:
        """A weight that is not quantised yet, one of another shape, or one repacked for inference."""
        state = self._state()
        if state is None:
            return "holds no quantised weight yet: move the model to its device first, which quantises it"
        if getattr(state, "packing_format_for_cpu", False):
            return (
                "was repacked for inference by a forward in eval mode on this CPU, and no gradient passes it any more: "
                "load the model again, and wrap it before its first forward"
            )
        return misfit(self, state.shape) or self._miscount() or too_old("bitsandbytes", (0, 45))

    def dense(self) -> Tensor:
        """W as bitsandbytes dequantises it, in the dtype that it was quantised from."""
        from bitsandbytes.functional import dequantize_4bit

        found: Tensor = dequantize_4bit(self.module.weight.data, self._state())
        return found

    def requantised(self, weight: Tensor) -> Mapping[str, object]:
        """A ``Params4bit`` with the same settings. The module has the ``quant_state`` too."""
        from bitsandbytes.nn import Params4bit

        own, state = self.module.weight, self._state()
        new = Params4bit(
            weight.detach().to(state.dtype),
            requires_grad=False,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=own.quant_storage,
        ).to(own.device)  # moving quantises it
        return {"weight": new, "quant_state": new.quant_state}

    def _miscount(self) -> str | None:
        stored = self.module.weight.data
        found = stored.numel() * stored.element_size()
        return miscount(self, "packed bytes", found, (self.in_features * self.out_features + 1) // 2)

    def _state(self) -> Any:
        state = getattr(self.module.weight, "quant_state", None)
        return self.module.quant_state if state is None else state
