"""What methods that change a layer's input share: W c(x) without a matrix as large as W, and the weight itself."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tunerkit.errors import TargetError
from tunerkit.plugin import BaseLayer, add_delta


def through(
    base: BaseLayer, x: Tensor, y: Tensor, dtype: torch.dtype, change: Callable[[Tensor, bool], Tensor]
) -> Tensor:
    """Return W c(x), for a linear c.

    In a linear layer, W is read in its own dtype and not copied, and the gradient of c needs no matrix as large as W.
    In others, such as convolutions, W C is computed.

    Args:
        base: The base layer.
        x: Its input.
        y: Its output, for the layout alone.
        dtype: That in which c computes.
        change: c, which multiplies rows (..., in) by a matrix (in, in); by the transposed one if its second argument
            is True.

    Returns:
        W c(x) in the layout of ``y``, on its device.
    """
    if not base.linear:
        return add_delta(base, x, torch.zeros_like(y), change(wide_weight(base, dtype), True).to(dtype))
    weight = base.dense()
    changed = change(x.to(weight.device, dtype), False)
    return base.project_in(changed.to(weight.dtype), weight).to(y.device)


def wide_weight(base: BaseLayer, dtype: torch.dtype) -> Tensor:
    """Return W, (out, in), in ``dtype``, but at least in fp32."""
    return base.dense().to(torch.promote_types(dtype, torch.float32))


def blockwise(rows: Tensor, blocks: Tensor) -> Tensor:
    """Multiply rows (..., in) by a matrix with these blocks (blocks, n, n) along its diagonal; a single one is reused.

    Without a copy of a block for each row, which broadcasting would make.
    """
    pieces, blocks = rows.unflatten(-1, (-1, blocks.shape[-1])), blocks.to(rows.dtype)
    return (pieces @ blocks[0] if len(blocks) == 1 else torch.einsum("...bi,bij->...bj", pieces, blocks)).flatten(-2)


def refuse_ids(base: BaseLayer, what: str) -> None:
    """Raise `TargetError` for an embedding: its input is a number and no vector.

    Args:
        base: The base layer.
        what: What the method does to the input, for the error: ``"oft turns"``.
    """
    if isinstance(base.module, nn.Embedding):
        raise TargetError(
            f"{what} a layer's input, and an embedding's is a token's number; name linear layers or convolutions"
        )
