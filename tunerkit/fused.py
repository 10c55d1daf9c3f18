"""The fused low-rank product: one autograd node that adds to the base layer's output in place.

The plain form writes two tensors as large as the output and one as large as the input that nobody asked for: the
delta, the sum, and the input's gradient through the adapter, which is then added to the one through the base layer.
Here the product is accumulated where the output lies, and one node gives the input's gradient through both.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.nn.modules import module as every_module

from tunerkit.base_layers import BaseLayer

_MARK = "_tunerkit_fresh"
_wanted = True


@contextmanager
def plain_form() -> Iterator[None]:
    """Compute every low-rank product in its plain form inside the block, to compare with."""
    global _wanted
    before, _wanted = _wanted, False
    try:
        yield
    finally:
        _wanted = before


def mark_fresh(base: BaseLayer, y: object) -> None:
    """Note on ``y`` that it comes straight from the forward of ``base`` and that nobody else has seen it.

    Only then may it be written to, and only then does its gradient reach the input through W alone. The note is on
    this very tensor: whatever an adapter makes of it is another one, and bears none.
    """
    module = base.module
    unseen = len(module._forward_hooks) == 1 and not every_module._global_forward_hooks
    plain = type(y) is Tensor and not y.is_nested and y.layout == torch.strided
    if _wanted and base.linear and unseen and "forward" not in vars(module) and plain:
        vars(y)[_MARK] = True


def fuses(x: Tensor, y: Tensor, q: Tensor, dtype: torch.dtype) -> bool:
    """Whether `add_fused` may stand in for the plain form, which would multiply in ``dtype``.

    Not under what looks into the operations of a forward (tracing, functorch, forward-mode derivatives), nor for
    tensors that have arithmetic of their own.
    """
    return (
        _MARK in vars(y)
        and type(x) is Tensor
        and y.dtype == dtype
        and y.is_contiguous()
        and x.device == y.device == q.device
        and not torch._C._is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def add_fused(
    base: BaseLayer, x: Tensor, y: Tensor, *, q: Tensor, p: Tensor, scale: float, lam: Tensor | None, dropped: bool
) -> Tensor:
    """Return y + scale · P diag(λ) Q x, written over ``y``; only where it `fuses`.

    ``x`` (..., in) and ``y`` (..., out) in one dtype, ``q`` (r, in), ``lam`` (r,) or None, ``p`` (out, r) in theirs.
    ``dropped`` says that ``x`` is not the base layer's own input any more, so the two need gradients apart.
    """
    weight = None if dropped else _frozen_weight(base, y.dtype)
    rows = x.reshape(-1, q.shape[1])
    added: Tensor = _FusedLowRank.apply(rows, y, weight, q, p, lam, scale)  # type: ignore[no-untyped-call]
    return added


def _frozen_weight(base: BaseLayer, dtype: torch.dtype) -> Tensor | None:
    """W (out, in), if the base layer has no gradient that would be lost by going past it, and computes in ``dtype``."""
    weight, bias = (base.module._parameters.get(name) for name in (base.weight_name, base.bias_name))
    frozen = all(own is None or (type(own) is nn.Parameter and not own.requires_grad) for own in (weight, bias))
    return base.matrix() if frozen and weight is not None and weight.dtype == dtype else None


class _FusedLowRank(Function):
    """out = y + s · P diag(λ) Q x, x (n, in); with ``w`` = W the node stands for the base layer too going backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, w: Tensor | None, q: Tensor, p: Tensor, lam: Tensor | None, scale: float
    ) -> Tensor:
        narrow_q, narrow_p = _folded(q, p, lam, y.dtype)
        h = x.mm(narrow_q.t())
        # Not y itself: autograd would have to know that it was changed, and would copy it where it is a view (a biased
        # linear layer's is). Whoever kept y for a backward of his own is still told, by the version that both share.
        out = y.detach()
        out.view(-1, p.shape[0]).addmm_(h, narrow_p.t(), alpha=scale)
        ctx.set_materialize_grads(False)
        ctx.scale = scale
        trained = any(ctx.needs_input_grad[3:6])
        ctx.save_for_backward(*((x, h) if trained else (None, None)), w, q, p, lam, narrow_q, narrow_p)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 7
        x, h, w, q, p, lam, narrow_q, narrow_p = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again: what forward computed has to depend on its inputs
            narrow_q, narrow_p = _folded(q, p, lam, g.dtype)
            h = None if x is None else x.mm(narrow_q.t())
        to_x, to_y, _, to_q, to_p, to_lam, _ = ctx.needs_input_grad
        s, g2 = ctx.scale, g.reshape(-1, p.shape[0])
        grad_x = grad_q = grad_p = grad_lam = None
        if to_x or to_q:
            grad_h = g2.mm(narrow_p)  # (n, r), without s: the products below take it in for nothing
        if to_x:
            grad_x = (grad_h * s).mm(narrow_q) if w is None else g2.mm(w).addmm_(grad_h, narrow_q, alpha=s)
        if to_q:
            # With beta=0 the first argument lends nothing but its shape.
            grad_q = torch.addmm(narrow_q, grad_h.t(), x, beta=0, alpha=s).to(q.dtype)
        if to_p or to_lam:
            grad_p = torch.addmm(narrow_p, g2.t(), h, beta=0, alpha=s).to(p.dtype)  # of P diag(λ)
            if lam is not None:
                grad_lam = (grad_p * p).sum(0) if to_lam else None
                grad_p = grad_p * lam
        return grad_x, g if to_y and w is None else None, None, grad_q, grad_p, grad_lam, None


def _folded(q: Tensor, p: Tensor, lam: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Q and P diag(λ) in the dtype of the product; rounded last, as the plain form rounds under autocast."""
    return q.to(dtype), (p if lam is None else p * lam).to(dtype)
