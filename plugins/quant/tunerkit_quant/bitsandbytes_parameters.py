"""Parameters outside linear layers in bitsandbytes' 4 bits, such as stacks of experts, in fingerprints."""

import math
from typing import Any, ClassVar, NoReturn, final

import attrs
from torch import Tensor, nn

from tunerkit.plugin import AdapterError, BaseLayer, Packing

_PARAMETRIZATION = "bitsandbytes.nn.parametrize.Bnb4bitParametrization"


@final
@attrs.frozen(eq=False)
class Bitsandbytes4BitParameter(BaseLayer):
    """What ``bitsandbytes.nn.parametrize.replace_parameter_4bit`` makes of a parameter, of any shape.

    It is no target: a plugin that knows the owner adapts the owner's weight, as tunerkit-experts does with stacks. The
    kind describes the weight in files, so that an adapter fits the base in another precision too.
    """

    forwards: ClassVar[tuple[str, ...]] = ("torch.nn.utils.parametrize.ParametrizationList",)
    weight_name: ClassVar[str] = "original"

    # Any: the attributes of bitsandbytes' classes.
    module: Any

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether the only parametrization of the parameter is bitsandbytes', by qualified name."""
        kinds = [f"{type(each).__module__}.{type(each).__qualname__}" for each in module.children()]
        return super().matches(module) and kinds == [_PARAMETRIZATION]

    @property
    def packing(self) -> Packing:
        """nf4 or fp4."""
        return Packing(f"bitsandbytes {self._state.quant_type}", 4)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter, such as (E, out, in)."""
        return tuple(self._state.shape)

    def obstacle(self) -> str | None:
        """Packed bytes that do not fit the shape."""
        stored = self.module.original
        found, wanted = stored.numel() * stored.element_size(), (math.prod(self.shape) + 1) // 2
        if found == wanted:
            return None
        return f"has {found} packed bytes, and a weight of shape {self.shape} needs {wanted}: quantise the model again"

    def dense(self) -> Tensor:
        """The weight as bitsandbytes dequantises it."""
        found: Tensor = self.module()
        return found.detach()

    def unpacked(self, weight: Tensor) -> NoReturn:
        """Raise `AdapterError`: the weight is a parameter of another module."""
        raise AdapterError(
            f"a parameter of shape {self.shape} is stored as {self.packing.name} and cannot be made dense. Load the "
            "adapter onto the base in full precision, and merge or unwrap there"
        )

    def project_in(self, x: Tensor, q: Tensor, dropout: float = 0.0) -> NoReturn:
        """Raise `AdapterError`: only the owner multiplies with the weight."""
        raise AdapterError(f"a parameter of shape {self.shape} in 4 bits has no forward of its own")

    def project_out(self, h: Tensor, p: Tensor) -> NoReturn:
        """As `project_in`."""
        self.project_in(h, p)

    def pack(self, weight: Tensor) -> NoReturn:
        """As `project_in`."""
        self.project_in(weight, weight)

    @property
    def _state(self) -> Any:
        return self.module[0].quant_state
