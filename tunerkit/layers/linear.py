"""Linear layers as base layers: ``nn.Linear`` and transformers' ``Conv1D``."""

from typing import ClassVar, final

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunerkit.layers.base import BaseLayer, drop, runs_forward_of
from tunerkit.libraries import CONV1D, FALCON_LINEAR, forward_name, weight_of


@final
@attrs.frozen(eq=False)
class LinearLayer(BaseLayer):
    """``nn.Linear``, and subclasses that keep its forward; also Falcon's, whose forward writes out x Wᵀ + b."""

    linear: ClassVar[bool] = True

    module: nn.Linear

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether the forward is exactly ``nn.Linear``'s or Falcon's."""
        return runs_forward_of(module, nn.Linear) or forward_name(module) == FALCON_LINEAR

    @property
    def in_features(self) -> int:
        """Features of the input."""
        return self.module.in_features

    @property
    def out_features(self) -> int:
        """Features of the output."""
        return self.module.out_features

    def project_in(self, x: Tensor, q: Tensor, dropout: float = 0.0) -> Tensor:
        """(..., in) to (..., r)."""
        return F.linear(drop(x, dropout), q)

    def project_out(self, h: Tensor, p: Tensor) -> Tensor:
        """(..., r) to (..., out)."""
        return F.linear(h, p)

    def example_input(self) -> Tensor:
        """(8, in)."""
        return torch.randn_like(self.matrix()[:1].detach().expand(8, -1))

    def dense(self) -> Tensor:
        """Return the weight itself, detached."""
        return weight_of(self.module).detach()

    def pack(self, weight: Tensor) -> Tensor:
        """(out, in), unchanged."""
        return weight

    def matrix(self) -> Tensor:
        """Return the weight itself."""
        return weight_of(self.module)


@final
@attrs.frozen(eq=False)
class Conv1DLayer(BaseLayer):
    """transformers' ``Conv1D`` (GPT-2): a linear layer whose weight is stored as (in, out)."""

    linear: ClassVar[bool] = True

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether the forward is that of transformers' class, matched by qualified name."""
        return forward_name(module) == CONV1D

    def project_in(self, x: Tensor, q: Tensor, dropout: float = 0.0) -> Tensor:
        """(..., in) to (..., r)."""
        return F.linear(drop(x, dropout), q)

    def project_out(self, h: Tensor, p: Tensor) -> Tensor:
        """(..., r) to (..., out)."""
        return F.linear(h, p)

    def example_input(self) -> Tensor:
        """(8, in)."""
        return torch.randn_like(self.matrix()[:1].detach().expand(8, -1))

    def dense(self) -> Tensor:
        """Return the weight transposed and detached, a view."""
        return self.matrix().detach()

    def pack(self, weight: Tensor) -> Tensor:
        """(out, in) to (in, out), a view."""
        return weight.t()

    def matrix(self) -> Tensor:
        """Return the weight transposed, a view."""
        return weight_of(self.module).t()
