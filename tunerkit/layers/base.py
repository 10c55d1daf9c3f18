"""The kinds of base layers: how each reads its input, is added to, and shows its weight as one (out, in) matrix."""

import abc
from typing import ClassVar, cast

import attrs
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tunerkit.libraries import forward_owner


@attrs.frozen(eq=False)
class BaseLayer(abc.ABC):
    """Abstract. A view of ``module`` as a matrix W: (out, in), whatever its own layout and arithmetic.

    The law that every kind keeps, for q (r, in) and p (out, r)::

        output with module.weight + pack(p @ q)  ==  output + project_out(project_in(x, q), p)

    A kind holds the module and nothing else, and reads it anew at each call: weights may be moved, resized, merged.
    ``weight_name`` and ``bias_name`` say which of the module's parameters hold W and the bias. A kind is ``linear`` if
    the output is exactly x Wᵀ + b over the last dimension, so that the product can be fused. A kind that ``lends`` is
    read whole by the module's own forward: no input of W can be seen from outside, so the weight is overridden for each
    call (`tunerkit.injection`), and `project_in` and `project_out` raise `AdapterError`.
    """

    weight_name: ClassVar[str] = "weight"
    bias_name: ClassVar[str] = "bias"
    lends: ClassVar[bool] = False
    linear: ClassVar[bool] = False

    module: nn.Module

    @classmethod
    @abc.abstractmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether this kind says the truth about ``module``.

        Be strict: a subclass or an instance with its own ``forward`` may do anything with its weight, and an adapter
        beside it would be wrong without an error.
        """

    @property
    @abc.abstractmethod
    def in_features(self) -> int:
        """Columns of W."""

    @property
    @abc.abstractmethod
    def out_features(self) -> int:
        """Rows of W."""

    @property
    def scale(self) -> float | Tensor:
        """What the layer multiplies W's output with, 1 unless a kind says otherwise; `project_out` includes it."""
        return 1.0

    @abc.abstractmethod
    def project_in(self, x: Tensor, q: Tensor, dropout: float = 0.0) -> Tensor:
        """Return h = Q x, reading ``x`` as the layer itself does.

        ``x`` is the layer's input (for an embedding the ids), ``q`` (r, in). ``dropout`` is the share of the input
        that is dropped; the caller passes 0 outside training. ``h`` has the layout of the layer's output with r in
        place of out (times the groups, for a convolution).
        """

    @abc.abstractmethod
    def project_out(self, h: Tensor, p: Tensor) -> Tensor:
        """Return what P h adds to the layer's output, in its layout: ``h`` from `project_in`, ``p`` (out, r)."""

    def shape_bias(self, b: Tensor) -> Tensor:
        """Return ``b`` (out,) shaped to broadcast over the layer's output: as it is, if features come last there."""
        return b

    @abc.abstractmethod
    def dense(self) -> Tensor:
        """Return W (out, in), detached and in the weight's dtype: a view where there can be one, so only read it."""

    @abc.abstractmethod
    def pack(self, weight: Tensor) -> Tensor:
        """Return ``weight`` (out, in), in its own dtype, in the layout of the module's own weight."""

    def matrix(self) -> Tensor:
        """Return W (out, in) itself, not detached. Only a `linear` kind is asked."""
        raise NotImplementedError(f"{type(self).__name__} says that it is linear: define matrix()")


def drop(x: Tensor, dropout: float) -> Tensor:
    """``x`` with a share of its elements dropped; ``x`` itself for a share of 0."""
    return F.dropout(x, dropout) if dropout > 0 else x


def weight_of(module: nn.Module) -> Tensor:
    """The attribute ``weight`` as the tensor that it is in every base layer."""
    return cast(Tensor, module.weight)


def runs_forward_of(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the forward of ``module`` is exactly that of ``kind``."""
    # A lazy layer inherits its forward too, and doesn't know its features yet.
    return isinstance(module, kind) and forward_owner(module) is kind and not is_lazy(weight_of(module))
