"""The fused form of a low-rank product, for large inputs of linear layers.

The product is accumulated in the memory of the base layer's output, and one autograd node computes the input's gradient
through both. The node saves aliases of its factors, since parameters may be merged, swapped or cast before backward.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from tunerkit.layers import products, torch_private
from tunerkit.layers.base_layer import BaseLayer
from tunerkit.layers.compiled import add_traced
from tunerkit.layers.kinds import drop
from tunerkit.layers.products import autocast_off, fold, product_dtype

MARK = "_tunerkit_straight"


class Mark(NamedTuple):
    """The mark on the output y of a linear layer: the layer, its input, and y's version counter when it was marked."""

    base: BaseLayer
    x: Tensor
    version: int | None
    traced: bool


def add_fused(
    base: BaseLayer, x: Tensor, y: Tensor, *, q: Tensor, p: Tensor, scale: float, lam: Tensor | None, dropout: float
) -> Tensor | None:
    """Return y + scale · P diag(λ) Q x, overwriting the marked ``y``; None if the plain form is needed.

    The plain form is needed if ``y`` was changed after it was marked, for tensor subclasses, if products have another
    dtype than ``y``, and while the operations of a forward are recorded. If ``x`` is the layer's own input, one node
    computes its gradient through the layer and the product.
    """
    mark: Mark | None = getattr(y, MARK)
    if mark is None or mark.base is not base or mark.traced != torch.compiler.is_compiling():
        return None
    weight = _frozen_weight(base, y) if mark.x is x and dropout == 0 else None
    if mark.traced:
        bias = torch_private.own_parameters(base.module).get(base.bias_name)
        return None if weight is None else add_traced(x, weight, bias, *fold(q, p, lam), scale)
    if mark.version != torch_private.version(y) or y.dtype != product_dtype(x, q) or not y.is_contiguous():
        return None
    if type(x) is not Tensor or not x.device == y.device == q.device or torch_private.is_observed():
        return None
    rows = drop(x.to(y.dtype), dropout).reshape(-1, q.shape[1])
    return _add(rows, y, weight, q, p, lam, scale)


def _frozen_weight(base: BaseLayer, y: Tensor) -> Tensor | None:
    """Return W (out, in) if weight and bias are frozen, so that backward can bypass the base layer; None otherwise.

    Also None if W and ``y`` differ in dtype or device: a DataParallel replica's base refers to the original module.
    """
    parameters = torch_private.own_parameters(base.module)
    weight, bias = parameters.get(base.weight_name), parameters.get(base.bias_name)
    frozen = all(own is None or (type(own) is nn.Parameter and not own.requires_grad) for own in (weight, bias))
    there = weight is not None and weight.dtype == y.dtype and weight.device == y.device
    return base.matrix() if frozen and there else None


class _FusedLowRank(Function):
    """Autograd function for y + s · P diag(λ) Q x, x (n, in). If ``w`` is W, backward includes the base layer."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, w: Tensor | None, q: Tensor, p: Tensor, lam: Tensor | None, scale: float
    ) -> Tensor:
        # Aliases keep these values if the ``data`` of a parameter is replaced.
        seen_pt, seen_lam = p.t(), None if lam is None else lam.unsqueeze(1)
        narrow_q, narrow_pt = q.detach().to(y.dtype), _folded(seen_pt, seen_lam, y)
        h = products.multiply(x, narrow_q.t())
        # Not y itself: it would need `mark_dirty`, and autograd would copy it if it is a view, as a biased linear
        # layer's output is. The version counter is shared, so an operation that saved y for backward raises an error.
        out = y.detach()
        out.view(-1, p.shape[0]).addmm_(h, narrow_pt, alpha=scale)
        ctx.set_materialize_grads(False)
        ctx.scale = scale
        kept = (x, h) if any(ctx.needs_input_grad[3:6]) else (None, None)
        ctx.save_for_backward(*kept, w if w is None else w.detach(), narrow_q, narrow_pt, seen_pt, seen_lam, q, p, lam)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 7
        with autocast_off(g.device):  # autocast may be on in backward only
            return _gradients(ctx, g)


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of forward's inputs; ``g`` (..., out) is the output's gradient. Autograd casts them."""
    x, h, w, narrow_q, narrow_pt, pt, lam, *parameters = ctx.saved_tensors
    if torch.is_grad_enabled():  # second derivatives: recompute the saved factors as functions of forward's inputs
        narrow_q, narrow_pt, pt, lam = _differentiable(narrow_q, narrow_pt, pt, lam, *parameters)
        h = None if x is None else products.multiply(x, narrow_q.t())
    to_x, to_y, _, to_q, to_p, to_lam, _ = ctx.needs_input_grad
    s, g2 = ctx.scale, g.reshape(-1, narrow_pt.shape[1])
    grad_x = grad_q = grad_p = grad_lam = None
    if to_x or to_q:
        grad_h = products.multiply(g2, narrow_pt.t())  # without s: the products below include it at no cost
    if to_x and w is None:
        grad_x = (grad_h * s).mm(narrow_q)
    elif to_x:
        grad_x = products.multiply(g2, w).addmm_(grad_h, narrow_q, alpha=s)
    if to_q:
        grad_q = products.gradient(grad_h, x, narrow_q, s)
    if to_p or to_lam:
        grad_pt = products.gradient(h, g2, narrow_pt, s)  # the gradient of diag(λ) Pᵀ
        if lam is not None:
            grad_lam = (grad_pt * pt).sum(1) if to_lam else None
            grad_pt = grad_pt * lam
        grad_p = grad_pt.t().contiguous()  # the layout of P, for optimizers that flatten gradients
    return grad_x, g if to_y and w is None else None, None, grad_q, grad_p, grad_lam, None


def _differentiable(
    narrow_q: Tensor, narrow_pt: Tensor, seen_pt: Tensor, seen_lam: Tensor | None, q: Tensor, p: Tensor, lam: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return forward's factors as differentiable functions of the parameters, with the values that forward used."""
    pt, lam = _as_seen(p.t(), seen_pt), None if lam is None else _as_seen(lam.unsqueeze(1), seen_lam)
    return _as_seen(q.to(narrow_q.dtype), narrow_q), _folded(pt, lam, narrow_pt), pt, lam


class _AsSeen(Function):
    """Returns ``seen``, forward's values of ``parameter``, and passes the gradient on to ``parameter``."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, seen: Tensor) -> Tensor:
        return seen.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


def _folded(pt: Tensor, lam: Tensor | None, y: Tensor) -> Tensor:
    """Return diag(λ) Pᵀ, rounded to the dtype of ``y`` after the product, as the plain form does under autocast."""
    return (pt if lam is None else pt * lam).to(y.dtype)


_add: Callable[..., Tensor] = _FusedLowRank.apply
_as_seen: Callable[..., Tensor] = _AsSeen.apply
