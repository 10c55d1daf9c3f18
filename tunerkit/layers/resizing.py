"""Give a tensor of an adapter another size, in place."""

import torch
from torch import Tensor


@torch.no_grad()
def resize_(parameter: Tensor, values: Tensor) -> None:
    """Replace a parameter's values in place, by a contiguous copy of new ones; its gradient is dropped.

    Args:
        parameter: The parameter or buffer to change.
        values: The new values, of any shape.
    """
    # While a loss of an earlier step is alive, autograd keeps the node that accumulates this gradient, with the old
    # shape. Changing the dtype makes autograd discard that node, hence the detour.
    parameter.grad = None
    other = torch.float64 if parameter.dtype != torch.float64 else torch.float32
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    # Contiguous, as a loaded file's tensors are: products of other layouts differ in their last bits.
    parameter.data = values.clone(memory_format=torch.contiguous_format)
