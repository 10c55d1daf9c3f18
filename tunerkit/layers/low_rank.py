"""The low-rank product that methods add to a base layer's output or weight: ΔW = scale · P diag(λ) Q.

Large inputs of linear layers use a fused form: `tunerkit.layers.fused`, or in compiled models on a CPU
`tunerkit.layers.compiled`. The fused forms avoid three tensors of the size of an activation: the delta, the sum, and
the input's gradient through the adapter.
"""

from typing import Any

import torch
from torch import Tensor

from tunerkit.errors import AdapterError
from tunerkit.layers import torch_private
from tunerkit.layers.base_layer import BaseLayer
from tunerkit.layers.fused import MARK, Mark, add_fused
from tunerkit.layers.products import autocast_off, fold, product_dtype
from tunerkit.layers.weights import code_owner, is_listed
from tunerkit.records import Factors

# The number of input elements from which the fused form is faster than the plain form (docs/evidence/speed.md).
LEAST_NUMBERS = 1 << 17
# Not measured: up to about this size, a GPU finishes a layer's products before the host launches the next ones, and the
# fused form takes more host time.
LEAST_ON_A_GPU = 1 << 20


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
    """Add a low-rank product to a base layer's output: y + scale · P diag(λ) Q x.

    The large output ``y`` of a linear layer may be overwritten, which saves memory; do not reuse it. ``x`` never is.

    The product is computed on the device of ``q`` and in its dtype, or in autocast's dtype if autocast is on. Only the
    sum is computed in the dtype of ``y``. If P or λ is 0, the result equals ``y`` bit for bit; in a compiled model on a
    CPU, up to rounding.

    Args:
        base: The base layer.
        x: The base layer's input, of any shape that it takes; also ids, an unbatched image or an empty batch.
        y: The base layer's output for ``x``.
        q: Q, (r, in).
        p: P, (out, r).
        scale: The factor of the product.
        lam: λ, (r,). Without it, diag(λ) is the identity.
        dropout: The share of the input of Q to drop. Pass 0 outside training.

    Returns:
        The sum, in the shape and dtype of ``y``; ``y`` itself for rank 0.
    """
    if q.shape[-2] == 0:
        return y
    if hasattr(y, MARK):  # the large output of a linear layer: the same sum, with less memory
        fused = add_fused(base, x, y, q=q, p=p, lam=lam, scale=scale, dropout=dropout)
        if fused is not None:
            return fused
    if lam is not None and not base.linear:
        (q, p), lam = fold(q, p, lam), None
    if x.dtype != q.dtype and x.is_floating_point() and product_dtype(x, q) == q.dtype:  # no ids, and no autocast
        x = x.to(q.dtype)
    # The base's own hooks may move its input to its device (accelerate's do); the adapter gets the input before that.
    h = base.project_in(x if x.device == q.device else x.to(q.device), q, dropout)  # Q x
    traced = torch.compiler.is_compiling()
    if lam is not None:
        lam, scale = lam * scale, 1.0  # a new tensor: the ``data`` of a parameter may be replaced before backward
        h = h * (lam if lam.dtype == h.dtype else lam.to(h.dtype))
        alike = type(y) is Tensor and y.dtype == h.dtype == p.dtype and y.device == h.device
        if base.linear and alike and not traced and h.ndim == 2 and y.shape == (len(h), len(p)):
            return torch.addmm(y, h, p.t())  # one operation for matrices
    elif traced:  # inductor ignores the alpha of a sum with a product (pytorch issue 167313)
        h, scale = h * scale, 1.0
    delta = base.project_out(h, p)  # P Q x
    if not (traced or y.is_nested) and delta.shape != y.shape:  # torch would broadcast a single feature
        raise AdapterError(
            f"the low-rank product has shape {(*delta.shape,)}, but the output of the {type(base.module).__name__} has "
            f"shape {(*y.shape,)}; pass the input and the output of the layer, and P as ({base.out_features}, r)"
        )
    return torch.add(y, delta.to(y.device, y.dtype), alpha=scale)


def mark(base: BaseLayer, x: object, y: Any, *, traced: bool) -> bool:
    """Mark ``y``, the output of ``base`` for ``x``, as writable by `add_low_rank`; return whether it was marked.

    Only the large output of a linear layer is marked, if nothing else changes or keeps it. Tensors that are computed
    from ``y`` have no mark. In a traced graph, the size is checked later.
    """
    if not base.linear or type(x) is not Tensor:
        return False
    if not traced and x.numel() < (LEAST_NUMBERS if x.is_cpu else LEAST_ON_A_GPU):
        return False
    # After a graph break, dynamo may trace this function alone, for a forward that is not traced.
    if torch.compiler.is_compiling() != traced or "forward" in vars(base.module) or torch_private.is_intercepted():
        return False
    is_known = base.forwards == () or is_listed(code_owner(base.module), base.forwards)
    if not (is_known and torch_private.has_single_hook(base.module) and type(y) is Tensor):
        return False
    if y.is_nested or y.layout != torch.strided:
        return False
    setattr(y, MARK, Mark(base, x, None if traced else torch_private.version(y), traced))
    return True


def unmark(y: Tensor, *, traced: bool) -> None:
    """Remove the mark of ``y`` after the adapters have run."""
    if traced:
        setattr(y, MARK, None)  # dynamo cannot trace delattr
    else:
        delattr(y, MARK)


def add_delta(base: BaseLayer, x: Tensor, y: Tensor, delta: Tensor, *, dropout: float = 0.0) -> Tensor:
    """Add ΔW x to a base layer's output, for a dense ΔW. For a low-rank product, `add_low_rank` is cheaper.

    Args:
        base: The base layer.
        x: The base layer's input.
        y: The base layer's output for ``x``, which may be overwritten in place; do not reuse it.
        delta: ΔW, (out, in); (E, out, in) for a stack.
        dropout: The share of the input of ΔW to drop. Pass 0 outside training.

    Returns:
        The sum, in the shape and dtype of ``y``.
    """
    if not (base.linear or base.stack):
        one = torch.eye(len(delta), dtype=delta.dtype, device=delta.device)
        return add_low_rank(base, x, y, q=delta, p=one, scale=1.0, dropout=dropout)
    return y + base.project_in(x.to(delta.device, delta.dtype), delta, dropout).to(y.device, y.dtype)


def low_rank_delta(base: BaseLayer, *, q: Tensor, p: Tensor, scale: float, lam: Tensor | None = None) -> Tensor:
    """Compute ΔW = scale · P diag(λ) Q as a matrix, as `tunerkit_delta` returns it.

    Args:
        base: The base layer.
        q: Q, (r, in).
        p: P, (out, r).
        scale: The factor of the product.
        lam: λ, (r,). Without it, diag(λ) is the identity.

    Returns:
        ΔW, (out, in), in fp32 or a wider dtype.

    Raises:
        AdapterError: The shapes do not fit ``base``. The product alone would not detect this.
    """
    if (found := (*p.shape[:-1], q.shape[-1])) != base.shape:
        raise AdapterError(
            f"P and Q give a delta of shape {found}, but the base layer has {base.shape}; "
            "build p as (base.out_features, r) and q as (r, base.in_features), in a stack with base.stack first"
        )
    wide = torch.promote_types(torch.promote_types(q.dtype, p.dtype), torch.float32)
    # Autocast would multiply in half precision, and the result of merging must not depend on the context.
    with autocast_off(q.device):
        q, p = fold(q.to(wide), p.to(wide), None if lam is None else lam.to(wide))
        return scale * (p @ q)


def low_rank_factors(q: Tensor, p: Tensor, *, scale: float, lam: Tensor | None = None) -> Factors:
    """Multiply scale and λ into P and Q, as `tunerkit_factors` returns them.

    Args:
        q: Q, (r, in).
        p: P, (out, r).
        scale: The factor of the product.
        lam: λ, (r,). Without it, diag(λ) is the identity.

    Returns:
        Q and P in fp32 or a wider dtype, with P Q = scale · P diag(λ) Q. They have gradients.
    """
    wide = torch.promote_types(torch.promote_types(q.dtype, p.dtype), torch.float32)
    q, p = fold(q.to(wide), p.to(wide), None if lam is None else lam.to(wide))
    return Factors(q=q, p=scale * p) if p.shape[-2] < q.shape[-1] else Factors(q=scale * q, p=p)


def misfit(base: BaseLayer, product: Factors) -> tuple[str, str] | None:
    """Return a product's shapes and the shapes that ``base`` needs, for a message; None if they fit."""
    q, p, rank, first = tuple(product.q.shape), tuple(product.p.shape), product.q.shape[-2:-1], base.shape[:-2]
    if (q, p) == ((*first, *rank, base.in_features), (*first, base.out_features, *rank)):
        return None
    stacked = f"{base.stack}, " if base.stack else ""
    needed = f"q ({stacked}r, {base.in_features}) and p ({stacked}{base.out_features}, r), with one r"
    return f"q of shape {q} and p of shape {p}", needed
