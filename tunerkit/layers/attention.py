"""The packed projection of ``nn.MultiheadAttention`` as a base layer: q, k and v in one (3·E, E) matrix."""

from typing import ClassVar, NoReturn, final

import attrs
from torch import Tensor, nn

from tunerkit.errors import AdapterError
from tunerkit.layers.base import BaseLayer
from tunerkit.libraries import forward_owner, torch_private, weight_of, whole_shape


@final
@attrs.frozen(eq=False)
class AttentionLayer(BaseLayer):
    """``nn.MultiheadAttention`` whose q, k and v have one width, E: W is ``in_proj_weight``, q above k above v.

    The output projection, ``out_proj``, is a linear layer of its own. With ``kdim`` or ``vdim`` there are three weights
    instead of one; this kind does not match those.
    """

    weight_name: ClassVar[str] = "in_proj_weight"
    bias_name: ClassVar[str] = "in_proj_bias"
    lends: ClassVar[bool] = True

    module: nn.MultiheadAttention

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether the forward is exactly torch's, and the projection one parameter."""
        packed = isinstance(torch_private.own_parameters(module).get(cls.weight_name), nn.Parameter)
        return packed and forward_owner(module) is nn.MultiheadAttention

    @property
    def in_features(self) -> int:
        """Width of the input, E."""
        return whole_shape(self.module.in_proj_weight)[1]

    @property
    def out_features(self) -> int:
        """Rows of q, k and v together, 3·E."""
        return whole_shape(self.module.in_proj_weight)[0]

    def project_in(self, x: Tensor, q: Tensor, dropout: float = 0.0) -> NoReturn:
        """Raise `AdapterError`: the output mixes the projections of three inputs, so nothing can be added to it."""
        raise AdapterError(_INSIDE)

    def project_out(self, h: Tensor, p: Tensor) -> NoReturn:
        """Raise `AdapterError`, as `project_in` does."""
        raise AdapterError(_INSIDE)

    def dense(self) -> Tensor:
        """Return ``in_proj_weight`` itself, detached."""
        return weight_of(self.module, self.weight_name).detach()

    def pack(self, weight: Tensor) -> Tensor:
        """(3·E, E), unchanged."""
        return weight


_INSIDE = (
    "nn.MultiheadAttention projects inside its forward(), so nothing can be added to that output from outside; an "
    "adapter there works through the weight that tunerkit_delta returns, not through its own forward()"
)
