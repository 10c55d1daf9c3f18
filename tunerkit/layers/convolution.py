"""Convolutions as base layers."""

import math
from typing import final

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunerkit.layers.base import BaseLayer, drop, runs_forward_of
from tunerkit.libraries import torch_private, weight_of


@final
@attrs.frozen(eq=False)
class ConvLayer(BaseLayer):
    """``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d`` with any groups, stride, dilation and padding.

    W is the weight (C_out, C_in/groups, *kernel) with all but its first dimension flattened, so in = C_in/groups ·
    positions of the kernel. Q is a convolution to r channels per group. The layer runs it in place of its own weight,
    so it has the layer's stride, dilation and padding mode. P is a 1×1 convolution of its output.
    """

    module: nn.Conv1d | nn.Conv2d | nn.Conv3d

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether both methods that make up a convolution's forward are torch's own."""
        kind = next((kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if runs_forward_of(module, kind)), None)
        return kind is not None and torch_private.runs_convolution_of(module, kind)

    @property
    def in_features(self) -> int:
        """Number of inputs to one position of one output channel: C_in/groups · positions of the kernel."""
        return self.module.in_channels // self.module.groups * math.prod(self.module.kernel_size)

    @property
    def out_features(self) -> int:
        """Output channels."""
        return self.module.out_channels

    def project_in(self, x: Tensor, q: Tensor, dropout: float = 0.0) -> Tensor:
        """(N, C_in, *size) to (N, groups · r, *size out); N may be missing."""
        kernel = q.reshape(q.shape[0], -1, *self.module.kernel_size)  # (r, C_in/groups, *kernel)
        if self.module.groups > 1:
            # Each group applies the same Q to its own channels, just as p @ q has the same Q in each group's rows.
            kernel = kernel.repeat(self.module.groups, *[1] * (kernel.ndim - 1))
        return torch_private.convolve(self.module, drop(x, dropout), kernel)

    def project_out(self, h: Tensor, p: Tensor) -> Tensor:
        """(N, groups · r, *size out) to (N, C_out, *size out); N may be missing."""
        dimensions = len(self.module.kernel_size)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[dimensions - 1]
        return convolve(h, p.reshape(*p.shape, *[1] * dimensions), groups=self.module.groups)

    def shape_bias(self, b: Tensor) -> Tensor:
        """(out,) to (out, 1, ...): right for batched and unbatched outputs."""
        return b.reshape(-1, *[1] * len(self.module.kernel_size))

    def example_input(self) -> Tensor:
        """(2, C_in, *size): twice the extent of the kernel in each dimension."""
        pairs = zip(self.module.kernel_size, self.module.dilation, strict=True)
        size = [2 * (dilation * (kernel - 1) + 1) for kernel, dilation in pairs]
        return torch.randn_like(weight_of(self.module).detach().new_empty(2, self.module.in_channels, *size))

    def dense(self) -> Tensor:
        """Return the weight with all but its first dimension flattened; a view if it is contiguous."""
        return weight_of(self.module).detach().flatten(1)

    def pack(self, weight: Tensor) -> Tensor:
        """(out, in) to (C_out, C_in/groups, *kernel)."""
        return weight.reshape(weight.shape[0], -1, *self.module.kernel_size)
