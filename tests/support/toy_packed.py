"""A toy base-layer kind: a linear layer whose weight is a buffer of 8-bit integers, which it packs itself."""

from typing import ClassVar

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunerkit.plugin import BaseLayer


class Int8Linear(nn.Module):
    """x Wᵀ + b, where row i of W is ``scale[i]`` times row i of ``weight``, which is int8."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        for name, tensor in quantised(linear.weight.detach()).items():
            self.register_buffer(name, tensor)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.scale[:, None] * self.weight, self.bias)


def quantised(weight: Tensor) -> dict[str, Tensor]:
    """Round a matrix (out, in) to int8 with a scale for each row."""
    scale = weight.abs().amax(dim=1) / 127
    return {"weight": (weight / scale[:, None]).round().to(torch.int8), "scale": scale}


@attrs.frozen(eq=False)
class Int8Layer(BaseLayer):
    """`Int8Linear` as a base layer."""

    linear: ClassVar[bool] = False  # the product is not fused: autograd must see how the weight is computed

    module: Int8Linear

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return type(module) is Int8Linear

    def project_in(self, x: Tensor, q: Tensor, dropout: float = 0.0) -> Tensor:
        return F.linear(F.dropout(x, dropout), q)

    def project_out(self, h: Tensor, p: Tensor) -> Tensor:
        return F.linear(h, p)

    def dense(self) -> Tensor:
        return self.tensor("scale")[:, None] * self.tensor("weight")

    def pack(self, weight: Tensor) -> Tensor:
        return weight

    def merged(self, delta: Tensor) -> dict[str, Tensor]:
        return quantised(self.dense() + delta)
