"""Norms as base layers with a vector as weight, for methods that adapt outputs only."""

from typing import NoReturn, final

import attrs
import torch
from torch import Tensor, nn

from tunerkit.errors import AdapterError
from tunerkit.layers import torch_private
from tunerkit.layers.base_layer import BaseLayer
from tunerkit.layers.kinds import OutputLayer
from tunerkit.layers.weights import forward_owner, weight_of, whole_shape
from tunerkit.paths import CHILD


@final
@attrs.frozen(eq=False)
class NormLayer(BaseLayer):
    """A norm over the last dimension: its output is w ⊙ n(x) + b. W is w as a column, (out, 1).

    Here the law of `BaseLayer` is: output with w + Δ == output + Δ ⊙ `normalised` (x), for any Δ (out,).

    Attributes:
        offset: w minus the module's weight: 1 in Gemma's norms, which multiply by 1 + weight; else 0.
    """

    offset: float = attrs.field(init=False)

    @offset.default
    def _offset(self) -> float:
        found = _offset_of(self.module)
        assert found is not None, "matches has checked it"
        return found

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether ``module`` is a norm by the law of `NormLayer`: a test on random inputs, not a list of classes."""
        return _offset_of(module) is not None

    @property
    def in_features(self) -> int:
        return 1

    @property
    def out_features(self) -> int:
        return whole_shape(self.tensor("weight"))[0]

    def normalised(self, x: Tensor) -> Tensor:
        """Compute n(x), without weight and bias, with the module's own forward.

        Args:
            x: The norm's input, (..., out).

        Returns:
            n(x), in the shape and dtype of ``x``.
        """
        return _run(self.module, x, x.new_full(x.shape[-1:], 1 - self.offset), x.new_zeros(x.shape[-1:])).to(x.dtype)

    def project_in(self, x: Tensor, q: Tensor, dropout: float = 0.0) -> NoReturn:
        """Raise `AdapterError`: no low-rank product can be added to a vector."""
        raise AdapterError(
            f"the weight of a {type(self.module).__name__} is a vector, to which no low-rank product can be added; "
            "exclude the module from the targets, or let the adapter's forward add base.normalised(x) times a vector"
        )

    def project_out(self, h: Tensor, p: Tensor) -> NoReturn:
        self.project_in(h, p)

    def dense(self) -> Tensor:
        weight = weight_of(self.module).detach()
        return (weight + self.offset if self.offset else weight)[:, None]

    def pack(self, weight: Tensor) -> Tensor:
        """Reshape a column (out, 1) to a vector (out,), like the module's weight."""
        return weight[:, 0]


def as_output(module: nn.Module) -> BaseLayer:
    """Return the base layer of a module that no other kind matches: `NormLayer` for a norm, else `OutputLayer`."""
    return NormLayer(module) if NormLayer.matches(module) else OutputLayer(module)


def _offset_of(module: nn.Module) -> float | None:
    """Return the `NormLayer.offset` of a module; None if the module is not a norm over the last dimension."""
    own, children = torch_private.parameters_of(module), torch_private.own_children(module)
    weight, more = own.get("weight"), [*module.buffers(recurse=False), *(children.keys() - {CHILD})]
    if weight is None or more or not own.keys() <= {"weight", "bias"} or forward_owner(module) is object:
        return None
    shape = whole_shape(weight)
    if len(shape) != 1 or not weight.is_floating_point():
        return None
    generator = torch.Generator().manual_seed(0)  # leaves the user's random state unchanged
    x, w, b = (torch.randn(*size, *shape, generator=generator, dtype=torch.float64) for size in ((2, 1), (), ()))
    b = b if "bias" in own else torch.zeros_like(b)
    try:
        with torch.no_grad():
            found = _run(module, x, w, b)
            for offset in (0.0, 1.0):
                expected = (w + offset) * _run(module, x, torch.full_like(w, 1 - offset), torch.zeros_like(b)) + b
                if found.shape == x.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-5):
                    return offset
    except Exception:  # a forward with other arguments or another input shape: not such a norm
        pass
    return None


def _run(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Call the module's forward with other parameters, on a stand-in object, since other threads may run the module."""
    cls = type(module)
    stand_in = object.__new__(cls)
    vars(stand_in).update(vars(module), _parameters={}, weight=weight, bias=bias)
    output: Tensor = cls.forward(stand_in, x)
    return output
