"""The low-rank product that methods add to a base layer, ΔW = scale · P diag(λ) Q: beside it, or as a matrix."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tunerkit.errors import AdapterError
from tunerkit.layers.base import BaseLayer
from tunerkit.layers.fused import add_fused, autocast_off, autocasts, fresh


def add_low_rank(
    base: BaseLayer,
    x: Tensor,
    y: Tensor,
    *,
    q: Tensor,
    p: Tensor,
    scale: float,
    lam: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return y + scale · P diag(λ) Q x, in the shape and dtype of ``y``.

    ``x`` is the base layer's input (an embedding's ids, an unbatched image, an empty batch: whatever it takes), ``y``
    its output, ``q`` (r, in), ``lam`` (r,), ``p`` (out, r); without ``lam``, diag(λ) is the identity. ``dropout`` is
    the share of the input dropped on the way into Q: pass 0 outside training.

    ``y`` is given up: where it comes straight from a linear layer the sum is written over it (`tunerkit.fused`), so
    read the result only. ``x`` is never written to.

    The product is computed on the device of ``q`` and in its dtype, or in autocast's where that is on, and only the
    sum in that of ``y``; with P or λ at 0 the result is ``y`` bit for bit. Rank 0 gives ``y`` itself.
    """
    if q.shape[0] == 0:
        return y
    dtype = _product_dtype(x, q)
    known = None if torch.compiler.is_compiling() else fresh(base, x, y, q, dtype)
    if known is not None:
        own_input = known.x() is x and dropout == 0
        x = F.dropout(x.to(dtype), dropout) if dropout > 0 else x.to(dtype)
        return add_fused(base, x, y, q=q, p=p, lam=lam, scale=scale, own_input=own_input)
    q, p = _fold(q, p, lam)
    h = base.project_in(_cast(x, q), q, dropout)
    return torch.add(y, base.project_out(h, p).to(y.device, y.dtype), alpha=scale)


def low_rank_delta(base: BaseLayer, *, q: Tensor, p: Tensor, scale: float, lam: Tensor | None = None) -> Tensor:
    """Return ΔW = scale · P diag(λ) Q as a matrix (out, in), in fp32 or wider: what `tunerkit_delta` wants.

    ``q`` (r, in), ``p`` (out, r), ``lam`` (r,), as for `add_low_rank`. Raises `AdapterError` if they don't fit
    ``base``, which multiplying would not notice.
    """
    expected = (base.out_features, base.in_features)
    if (p.shape[0], q.shape[1]) != expected:
        raise AdapterError(
            f"P and Q give a delta of shape {(p.shape[0], q.shape[1])}, and the base layer has {expected}; "
            "build p as (base.out_features, r) and q as (r, base.in_features)"
        )
    wide = torch.promote_types(torch.promote_types(q.dtype, p.dtype), torch.float32)
    # Autocast would multiply in half precision, and merging must not depend on where it is called.
    with autocast_off(q.device):
        q, p = _fold(q.to(wide), p.to(wide), None if lam is None else lam.to(wide))
        return scale * (p @ q)


def _fold(q: Tensor, p: Tensor, lam: Tensor | None) -> tuple[Tensor, Tensor]:
    """Put diag(λ) into the smaller of Q's rows and P's columns: a vocabulary on one side is not worth a copy."""
    if lam is None:
        return q, p
    if q.shape[1] <= p.shape[0]:
        return lam.unsqueeze(1) * q, p
    return q, p * lam


def _cast(x: Tensor, q: Tensor) -> Tensor:
    """Bring ``x`` to the adapter's device and dtype; ids keep theirs, and what autocast casts (all but float64).

    The base's own hooks may move its input to where it runs (accelerate's do), and the adapter sees it unmoved.
    """
    if not x.is_floating_point() or (autocasts(q.device) and torch.float64 not in (x.dtype, q.dtype)):
        return x.to(q.device)
    return x.to(q.device, q.dtype)


def _product_dtype(x: Tensor, q: Tensor) -> torch.dtype:
    """The dtype that the plain form multiplies in: autocast's, which leaves float64 alone, or Q's."""
    if autocasts(q.device) and torch.float64 not in (x.dtype, q.dtype):
        return torch.get_autocast_dtype(q.device.type)
    return q.dtype
