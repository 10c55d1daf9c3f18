"""The fused form of a low-rank product for compiled models on a CPU, as operations that a compiler takes as they are.

In the plain form, a compiler computes the base layer, the product and their sum one after the other, and so it does
with their gradients. Here, one operation computes the base layer too, and accumulates the product in its output; the
base's own output is no longer needed, so the compiler leaves it out. Two more operations compute the gradients.
"""

from typing import Any

import torch
from torch import Tensor

from tunerkit.layers import products, torch_private
from tunerkit.layers.base import BaseLayer
from tunerkit.layers.fused import autocasts, frozen_weight, is_alone

# Numbers of an input from which the operations take less time than what they replace (docs/evidence/speed.md).
LEAST_NUMBERS = 1 << 17
_MARK = "_tunerkit_traced"


def mark_traced(base: BaseLayer, x: object, y: object) -> bool:
    """Mark ``y``, in the graph that is being traced, as what comes straight from ``base`` for ``x``; whether it was."""
    if not (is_alone(base) and isinstance(x, Tensor) and isinstance(y, Tensor)):
        return False
    # On the tensor itself: within checkpoints and transforms, nothing that lives longer may be changed. What is
    # computed from it has no mark.
    setattr(y, _MARK, (base, x))
    return True


def unmark_traced(y: Tensor) -> None:
    """Remove the mark, once the adapters have run."""
    setattr(y, _MARK, None)  # dynamo cannot trace delattr


def add_traced(
    base: BaseLayer, x: Tensor, y: Tensor, *, q: Tensor, p: Tensor, scale: float, dropout: float
) -> Tensor | None:
    """Compute y + scale · P Q x as one operation, without ``y``; None where the traced graph needs the plain form.

    It does if it is exported, where others look for operations that they know; and where a transform of torch.func
    would need a rule for them.
    """
    mark = y._tunerkit_traced if hasattr(y, _MARK) else None  # type: ignore[attr-defined]
    if mark is None or mark[0] is not base or mark[1] is not x or torch.compiler.is_exporting():
        return None
    alike = x.dtype == y.dtype == q.dtype == torch.float32 and x.device.type == y.device.type == q.device.type == "cpu"
    if not alike or dropout or autocasts(q.device) or torch_private.is_transformed() or x.numel() < LEAST_NUMBERS:
        return None
    w, bias = frozen_weight(base, y), torch_private.own_parameters(base.module).get(base.bias_name)
    return None if w is None else linear_low_rank(x, w, bias, q, p, float(scale))[0]


@torch.library.custom_op(
    "tunerkit::linear_low_rank",
    mutates_args=(),
    schema="(Tensor x, Tensor w, Tensor? bias, Tensor q, Tensor p, float scale) -> (Tensor, Tensor)",
)
def linear_low_rank(
    x: Tensor, w: Tensor, bias: Tensor | None, q: Tensor, p: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return x Wᵀ + bias + scale · x Qᵀ Pᵀ, (..., out), and h = x Qᵀ, (n, r), for ``x`` (..., in)."""
    rows = x.reshape(-1, x.shape[-1])
    h = products.multiply(rows, q.t())
    out = products.affine(rows, w, bias).addmm_(h, p.t(), alpha=scale)
    return out.view(*x.shape[:-1], len(w)), h.contiguous()


@torch.library.custom_op(
    "tunerkit::linear_low_rank_factors",
    mutates_args=(),
    schema="(Tensor g, Tensor x, Tensor h, Tensor q, Tensor p, float scale) -> (Tensor, Tensor, Tensor)",
)
def gradients_of_factors(
    g: Tensor, x: Tensor, h: Tensor, q: Tensor, p: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return g P, (n, r), and the gradients of Q and P, for the gradient ``g`` (..., out) of the sum."""
    rows, g2 = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    grad_h = products.multiply(g2, p)
    grad_q = products.gradient(grad_h, rows, q, scale)
    return grad_h.contiguous(), grad_q, products.gradient(h, g2, p.t(), scale).t().contiguous()


@torch.library.custom_op(
    "tunerkit::linear_low_rank_input",
    mutates_args=(),
    schema="(Tensor g, Tensor w, Tensor grad_h, Tensor q, float scale) -> Tensor",
)
def gradient_of_input(g: Tensor, w: Tensor, grad_h: Tensor, q: Tensor, scale: float) -> Tensor:
    """Return g W + scale · grad_h Q, (..., in)."""
    found = products.multiply(g.reshape(-1, g.shape[-1]), w).addmm_(grad_h, q, alpha=scale)
    return found.view(*g.shape[:-1], q.shape[1])


@linear_low_rank.register_fake
def _(x: Tensor, w: Tensor, bias: Tensor | None, q: Tensor, p: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], len(w)), x.new_empty(x.numel() // x.shape[-1], len(q))


@gradients_of_factors.register_fake
def _(g: Tensor, x: Tensor, h: Tensor, q: Tensor, p: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return h.new_empty(h.shape), q.new_empty(q.shape), p.new_empty(p.shape)


@gradient_of_input.register_fake
def _(g: Tensor, w: Tensor, grad_h: Tensor, q: Tensor, scale: float) -> Tensor:
    return g.new_empty(*g.shape[:-1], q.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w, _, q, p, ctx.scale = inputs
    ctx.save_for_backward(x, w, q, p, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 6
    x, w, q, p, h = ctx.saved_tensors
    grad_h, grad_q, grad_p = gradients_of_factors(g, x, h, q, p, ctx.scale)
    grad_x = gradient_of_input(g, w, grad_h, q, ctx.scale) if ctx.needs_input_grad[0] else None
    return grad_x, None, None, grad_q, grad_p, None


linear_low_rank.register_autograd(_backward, setup_context=_keep)
