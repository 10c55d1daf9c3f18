"""The low-rank product that methods add to a base layer, ΔW = scale · P diag(λ) Q: in its output, or as a matrix.

In an output it has two forms. The plain one allocates three large tensors: the delta and the sum, both as large as the
output, and the input's gradient through the adapter, which is then added to the gradient through the base layer. The
fused one accumulates the product in the output's own memory, and one node computes the input's gradient through both.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.module import register_module_forward_hook

from tunerkit.errors import AdapterError
from tunerkit.layers import torch_private
from tunerkit.layers.base import BaseLayer
from tunerkit.layers.kinds import drop
from tunerkit.records import Factors

_MARK = "_tunerkit_fresh"


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

    ``y`` may be overwritten in place; do not reuse it. This happens where it comes straight from a linear layer, and
    saves memory. ``x`` is never written to.

    The product is computed on the device of ``q`` and in its dtype, or in autocast's dtype if autocast is on. Only the
    sum is computed in the dtype of ``y``. If P or λ is 0, the result equals ``y`` bit for bit.

    Args:
        base: The base layer.
        x: The base layer's input, of any shape that it takes, such as an embedding's ids, an unbatched image or an
            empty batch.
        y: The base layer's output for ``x``.
        q: Q, (r, in).
        p: P, (out, r).
        scale: The factor of the product.
        lam: λ, (r,). Without it, diag(λ) is the identity.
        dropout: The share of the input of Q to drop. Pass 0 outside training.

    Returns:
        The sum, in the shape and dtype of ``y``; ``y`` itself for rank 0.
    """
    if q.shape[0] == 0:
        return y
    # The same sum in one node and in y's own memory, where that is safe.
    if not torch.compiler.is_compiling() and is_fresh(base, x, y, q, _product_dtype(x, q)):
        return add_fused(base, x, y, q=q, p=p, lam=lam, scale=scale, dropout=dropout)
    q, p = _fold(q, p, lam)
    # The base's own hooks may move its input to its device (accelerate's do); the adapter gets the input before that.
    # Ids keep their dtype, and so does what autocast casts.
    cast = x.is_floating_point() and _product_dtype(x, q) == q.dtype
    h = base.project_in(x.to(q.device, q.dtype if cast else x.dtype), q, dropout)  # Q x
    delta = base.project_out(h, p)  # P Q x
    return torch.add(y, delta.to(y.device, y.dtype), alpha=scale)


def add_delta(base: BaseLayer, x: Tensor, y: Tensor, delta: Tensor, *, dropout: float = 0.0) -> Tensor:
    """Add ΔW x to a base layer's output, for a ΔW that is no product. Of a product, `add_low_rank` takes less.

    Args:
        base: The base layer.
        x: The base layer's input.
        y: The base layer's output for ``x``, which may be overwritten in place; do not reuse it.
        delta: ΔW, (out, in).
        dropout: The share of the input of ΔW to drop. Pass 0 outside training.

    Returns:
        The sum, in the shape and dtype of ``y``.
    """
    if not base.linear:
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
    expected = (base.out_features, base.in_features)
    if (p.shape[0], q.shape[1]) != expected:
        raise AdapterError(
            f"P and Q give a delta of shape {(p.shape[0], q.shape[1])}, but the base layer has {expected}; "
            "build p as (base.out_features, r) and q as (r, base.in_features)"
        )
    wide = torch.promote_types(torch.promote_types(q.dtype, p.dtype), torch.float32)
    # Autocast would multiply in half precision, and the result of merging must not depend on the context.
    with autocast_off(q.device):
        q, p = _fold(q.to(wide), p.to(wide), None if lam is None else lam.to(wide))
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
    q, p = _fold(q.to(wide), p.to(wide), None if lam is None else lam.to(wide))
    return Factors(q=q, p=scale * p) if p.shape[0] < q.shape[1] else Factors(q=scale * q, p=p)


def misfit(base: BaseLayer, product: Factors) -> tuple[str, str] | None:
    """Return the shapes of a product and those that ``base`` needs, for a message; None if they fit."""
    q, p, rank = tuple(product.q.shape), tuple(product.p.shape), product.q.shape[:1]
    if (q, p) == ((*rank, base.in_features), (base.out_features, *rank)):
        return None
    needed = f"q (r, {base.in_features}) and p ({base.out_features}, r), with one r"
    return f"q of shape {q} and p of shape {p}", needed


def _fold(q: Tensor, p: Tensor, lam: Tensor | None) -> tuple[Tensor, Tensor]:
    """Multiply λ into the smaller of Q and P, so that a side as large as a vocabulary is not copied."""
    if lam is None:
        return q, p
    if q.shape[1] <= p.shape[0]:
        return lam.unsqueeze(1) * q, p
    return q, p * lam


def _product_dtype(x: Tensor, q: Tensor) -> torch.dtype:
    """The dtype of the plain form's products: autocast's, which does not apply to float64, or else Q's."""
    if autocasts(q.device) and torch.float64 not in (x.dtype, q.dtype):
        return torch.get_autocast_dtype(q.device.type)
    return q.dtype


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for the type of ``device``. The meta device has none, and querying it would raise."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def autocast_off(device: torch.device) -> AbstractContextManager[object]:
    """A block without autocast: products keep the dtype of their factors."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


# --- The fused form ---------------------------------------------------------------------------------------------------


class _Fresh(NamedTuple):
    """The mark of a tensor that comes straight from a base layer: the module, its input, the tensor's version."""

    module: nn.Module
    x: "ref[Tensor]"
    version: int | None


def plain_form() -> AbstractContextManager[object]:
    """Compute every low-rank product in its plain form until the end of the block, as a reference for tests."""
    # Nothing is fused where another hook sees the base layers' outputs. This one does, and ignores them.
    return register_module_forward_hook(lambda module, args, output: None)


def mark_fresh(base: BaseLayer, x: object, y: object) -> bool:
    """Mark ``y`` as coming straight from the forward of ``base`` on ``x``, if it does; whether it was marked.

    Only a marked tensor may be overwritten. The mark is valid until the tensor changes or `unmark` removes it. It is on
    this object alone: a tensor that an adapter computes from it has none.
    """
    module = base.module
    if torch.compiler.is_compiling():  # a compiled forward may call this by itself, where a graph was broken
        return False
    if not (base.linear and torch_private.has_single_hook(module) and "forward" not in vars(module)):
        return False
    if type(x) is not Tensor or type(y) is not Tensor or y.is_nested or y.layout != torch.strided:
        return False
    vars(y)[_MARK] = _Fresh(module, ref(x), torch_private.version(y))
    return True


def unmark(y: Tensor) -> None:
    """Remove the mark, once the adapters have run."""
    vars(y).pop(_MARK, None)


def is_fresh(base: BaseLayer, x: Tensor, y: Tensor, q: Tensor, dtype: torch.dtype) -> bool:
    """Whether `add_fused` may replace the plain form, which would multiply in ``dtype``: ``y`` has a valid mark.

    Not if something records the operations of a forward (tracing, functorch, forward-mode differentiation, selective
    checkpointing), and not for tensor subclasses, which define their own operations.
    """
    mark: _Fresh | None = vars(y).get(_MARK)
    if mark is None or mark.module is not base.module or mark.version != torch_private.version(y):
        return False
    if type(x) is not Tensor or y.dtype != dtype or not y.is_contiguous() or not x.device == y.device == q.device:
        return False
    return not torch_private.is_observed()


def add_fused(
    base: BaseLayer, x: Tensor, y: Tensor, *, q: Tensor, p: Tensor, scale: float, lam: Tensor | None, dropout: float
) -> Tensor:
    """Return y + scale · P diag(λ) Q x, overwriting ``y``. Call it only if ``y`` `is_fresh`.

    If ``x`` is the base layer's own input, one node computes its gradients through both.
    """
    mark: _Fresh = vars(y)[_MARK]
    weight = _frozen_weight(base, y) if mark.x() is x and dropout == 0 else None
    rows = drop(x.to(y.dtype), dropout).reshape(-1, q.shape[1])
    added: Tensor = _FusedLowRank.apply(rows, y, weight, q, p, lam, scale)  # type: ignore[no-untyped-call]
    return added


def _frozen_weight(base: BaseLayer, y: Tensor) -> Tensor | None:
    """W (out, in), if weight and bias are frozen, so that bypassing the base layer in backward loses no gradient.

    None also if W differs from ``y`` in dtype or device: DataParallel's replicas hold the original module.
    """
    parameters = torch_private.own_parameters(base.module)
    weight, bias = parameters.get(base.weight_name), parameters.get(base.bias_name)
    frozen = all(own is None or (type(own) is nn.Parameter and not own.requires_grad) for own in (weight, bias))
    there = weight is not None and weight.dtype == y.dtype and weight.device == y.device
    return base.matrix() if frozen and there else None


class _FusedLowRank(Function):
    """out = y + s · P diag(λ) Q x, with x (n, in). With ``w`` = W, backward includes the base layer's part.

    A thin P (see `is_thin`) is copied into contiguous columns first, and its gradient is computed in that layout.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, w: Tensor | None, q: Tensor, p: Tensor, lam: Tensor | None, scale: float
    ) -> Tensor:
        by_column = is_thin(q, y)  # also without gradients, where it gains nothing: outputs must be bit-identical
        narrow_q, narrow_p = q.to(y.dtype), folded_by_column(p, lam, y) if by_column else _folded(p, lam, y)
        narrow_pt = narrow_p.t()
        h = x.mm(narrow_q.t())
        # Not y itself: autograd would have to be notified of the change, and would copy y where it is a view, as a
        # biased linear layer's output is. The version counter is shared, so whoever saved y for backward gets an error.
        out = y.detach()
        out.view(-1, p.shape[0]).addmm_(h, narrow_pt, alpha=scale)
        ctx.set_materialize_grads(False)
        ctx.scale = scale
        kept = (x, h) if any(ctx.needs_input_grad[3:6]) else (None, None)
        ctx.save_for_backward(*kept, w, q, p, lam, narrow_q, narrow_p, narrow_pt if by_column else None)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 7
        with autocast_off(g.device):  # autocast may be on now although it was off in forward
            return _gradients(ctx, g)


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of forward's inputs, for the gradient ``g`` (..., out) of the sum."""
    x, h, w, q, p, lam, narrow_q, narrow_p, kept_pt = ctx.saved_tensors
    if torch.is_grad_enabled():  # second derivatives: what forward computed must depend on its inputs
        narrow_q, narrow_p = q.to(g.dtype), _folded(p, lam, g)
        h = None if x is None else x.mm(narrow_q.t())
    to_x, to_y, _, to_q, to_p, to_lam, *_ = ctx.needs_input_grad
    s, g2 = ctx.scale, g.reshape(-1, p.shape[0])
    grad_x = grad_q = grad_p = grad_lam = None
    if to_x or to_q:
        grad_h = g2.mm(narrow_p)  # (n, r), without s: the products below include it at no cost
    if to_x:
        grad_x = (grad_h * s).mm(narrow_q) if w is None else g2.mm(w).addmm_(grad_h, narrow_q, alpha=s)
    # With beta=0 only the shape of the first argument is used.
    if to_q:
        grad_q = torch.addmm(narrow_q, grad_h.t(), x, beta=0, alpha=s).to(q.dtype)
    if to_p or to_lam:
        # First the gradient of P diag(λ).
        if kept_pt is not None:
            grad_p = torch.addmm(kept_pt, h.t(), g2, beta=0, alpha=s).t().to(p.dtype)
        else:
            grad_p = torch.addmm(narrow_p, g2.t(), h, beta=0, alpha=s).to(p.dtype)
        if lam is not None:
            grad_lam = (grad_p * p).sum(0) if to_lam else None
            grad_p = grad_p * lam
        grad_p = grad_p.contiguous()  # the layout of P, for optimizers that flatten gradients
    return grad_x, g if to_y and w is None else None, None, grad_q, grad_p, grad_lam, None


def is_thin(q: Tensor, y: Tensor) -> bool:
    """Whether backward is faster with P in contiguous columns, for a product in the dtype of ``y``.

    On a CPU, a product of a tall matrix with a thin one is two to three times as fast if the thin one's columns are
    contiguous, until one of its rows fills a vector register of 64 bytes (docs/evidence/speed.md). On a GPU it is not.
    """
    return y.device.type == "cpu" and q.shape[0] * y.element_size() < 64


def _folded(p: Tensor, lam: Tensor | None, y: Tensor) -> Tensor:
    """P diag(λ), rounded to the dtype of ``y`` last, as the plain form rounds under autocast."""
    return (p if lam is None else p * lam).to(y.dtype)


def folded_by_column(p: Tensor, lam: Tensor | None, y: Tensor) -> Tensor:
    """P diag(λ) in the dtype of ``y``, with contiguous columns and without gradients."""
    folded = torch.empty_permuted(p.shape, (1, 0), dtype=y.dtype, device=y.device)
    return folded.copy_(p) if lam is None else torch.mul(p, lam, out=folded)
