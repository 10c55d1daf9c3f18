"""Pack several tensors into one vector, for a single collective."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tunerkit_distributed import torch_private


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors into one vector, on the first one's device and in the widest dtype, at least fp32."""
    dtype = torch.float32
    for kind in {tensor.dtype for tensor in tensors}:
        dtype = torch.promote_types(dtype, kind)
    return torch.cat([tensor.detach().reshape(-1).to(tensors[0].device, dtype) for tensor in tensors])


def unflatten_(vector: Tensor, tensors: Sequence[Tensor]) -> None:
    """Copy a vector from `flat` back into the tensors."""
    parts = vector.split([tensor.numel() for tensor in tensors])
    shaped = [part.view(tensor.shape) for tensor, part in zip(tensors, parts, strict=True)]
    torch_private.copy_(list(tensors), shaped)
