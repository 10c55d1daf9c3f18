"""``nn.Linear`` with a weight that torchao quantised, weight-only."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar, final

import attrs
from torch import Tensor, nn

from tunerkit.plugin import Packing
from tunerkit_quant.packed import PackedLinear
from tunerkit_quant.shapes import misfit
from tunerkit_quant.versions import too_old

_BASE = "torchao.utils.TorchAOBaseTensor"
_INT8, _INTX = "Int8Tensor", "IntxUnpackedToInt8Tensor"
# What each class calls the quantisation of its input.
_ACTIVATIONS = {_INT8: "act_quant_kwargs", _INTX: "activation_quantization"}


@final
@attrs.frozen(eq=False)
class TorchaoLayer(PackedLinear):
    """``nn.Linear`` after ``torchao.quantization.quantize_``, with int8 or an integer of fewer bits."""

    forwards: ClassVar[tuple[str, ...]] = ("torch.nn.modules.linear.Linear",)

    # Any: the attributes of torchao's tensors.
    module: Any

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether the forward is ``nn.Linear``'s and the weight is torchao's, by qualified name."""
        kinds = type(module.weight).__mro__ if super().matches(module) else ()
        return any(f"{kind.__module__}.{kind.__qualname__}" == _BASE for kind in kinds)

    @property
    def packing(self) -> Packing:
        """int8, int4 and the like; the class's name for others, which have an `obstacle`."""
        dtype = {_INT8: "int8", _INTX: str(getattr(self._weight, "target_dtype", "")).removeprefix("torch.")}
        name = dtype.get(self._class, self._class)
        bits = re.search(r"\d+", name)
        return Packing(f"torchao {name}", int(bits.group()) if bits else 8)

    def obstacle(self) -> str | None:
        """Quantised activations, which pass no gradient; a class that is not supported; a weight of another shape."""
        if self._class not in _ACTIVATIONS:
            return (
                f"has a weight of torchao's class {self._class}, through which no gradient is known to pass: use "
                "Int8WeightOnlyConfig or IntxWeightOnlyConfig"
            )
        if getattr(self._weight, _ACTIVATIONS[self._class]) is not None:
            return (
                "quantises its input too, and torchao passes no gradient through that: use Int8WeightOnlyConfig or "
                "IntxWeightOnlyConfig"
            )
        integers = self._weight.qdata  # the weight has a shape of its own beside that of its integers
        return misfit(self, self._weight.shape) or misfit(self, integers.shape) or too_old("torchao", (0, 17))

    def dense(self) -> Tensor:
        """W as torchao dequantises it, in the dtype that it was quantised from."""
        found: Tensor = self._weight.dequantize()
        return found.detach()

    def requantised(self, weight: Tensor) -> Mapping[str, object]:
        """A weight of the same class, with the same blocks."""
        from torchao.quantization import PerGroup, PerRow, PerTensor
        from torchao.quantization.quant_primitives import MappingType

        own, values = self._weight, weight.detach().to(self._weight.dtype)
        mapping = MappingType.ASYMMETRIC if _shifts(own) else MappingType.SYMMETRIC
        if self._class == _INTX:
            new = type(own).from_hp(values, own.block_size, own.target_dtype, mapping_type=mapping)
        else:
            rows, columns = own.block_size
            whole = {(1, self.in_features): PerRow(), (self.out_features, self.in_features): PerTensor()}
            granularity = whole.get((rows, columns), PerGroup(columns))
            new = type(own).from_hp(values, granularity, mapping, reduce_range=own.reduce_range)
        return {"weight": nn.Parameter(new, requires_grad=False)}

    @property
    def _weight(self) -> Any:
        return self.module.weight

    @property
    def _class(self) -> str:
        return type(self.module.weight).__name__


def _shifts(weight: Any) -> bool:
    """Whether a weight was quantised with zero points other than 0."""
    return weight.zero_point is not None and bool(weight.zero_point.any())
