"""What methods that change a layer's input share: W c(x) without a matrix as large as W, and the matrix W C."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tunerkit.errors import TargetError
from tunerkit.plugin import BaseLayer


def through(base: BaseLayer, x: Tensor, dtype: torch.dtype, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return W c(x), in the layout of the output of a linear layer.

    W is read in its own dtype, and is not copied. The gradient of c needs no matrix as large as W either.

    Args:
        base: The base layer; it must be ``linear``.
        x: Its input, (..., in).
        dtype: That in which c computes.
        change: c, which maps (..., in) to (..., in).
    """
    weight = base.dense()
    changed = change(x.to(weight.device, dtype))
    return base.project_in(changed.to(weight.dtype), weight)


def wide_weight(base: BaseLayer, dtype: torch.dtype) -> Tensor:
    """Return W, (out, in), in ``dtype``, but at least in fp32."""
    return base.dense().to(torch.promote_types(dtype, torch.float32))


def refuse_ids(base: BaseLayer, what: str) -> None:
    """Raise `TargetError` for an embedding: its input is a number and no vector.

    Args:
        base: The base layer.
        what: What the method does to the input, for the error: ``"oft rotates"``.
    """
    if isinstance(base.module, nn.Embedding):
        raise TargetError(
            f"{what} a layer's input, and an embedding's is a token's number; name linear layers or convolutions"
        )
