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
from tunerkit.layers.fused import autocast_off, autocasts, frozen_weight, is_straight

# Numbers of an input from which the operations take less time than what they replace (docs/evidence/speed.md).
LEAST_NUMBERS = 1 << 17
_MARK = "_tunerkit_traced"


def mark_traced(base: BaseLayer, x: Tensor, y: Tensor) -> bool:
    """Mark ``y``, in the graph that is being traced, as what comes straight from ``base`` for ``x``; whether it was.

    The mark is on this tensor alone: within checkpoints and transforms, nothing that lives longer may be changed. It
    holds because adapters do not write into ``x`` and ``y``.
    """
    if is_straight(base, x, y):
        setattr(y, _MARK, (base, x))
        return True
    return False


def unmark_traced(y: Tensor) -> None:
    """Remove the mark, once the adapters have run."""
    setattr(y, _MARK, None)  # dynamo cannot trace delattr


def add_traced(
    base: BaseLayer, x: Tensor, y: Tensor, *, q: Tensor, p: Tensor, scale: float, dropout: float
) -> Tensor | None:
    """Compute y + scale · P Q x as one operation, without ``y``; None where the traced graph needs the plain form.

    That is: with dropout, under autocast, in another dtype than fp32, elsewhere than on a CPU, for an input that is
    known to be small, and where the base is trained or packed. Also in a graph that is exported, where others look for
    operations that they know, and where a transform of torch.func would need a rule for them.
    """
    mark = getattr(y, _MARK) if hasattr(y, _MARK) else None  # with a default, dynamo finds something in any tensor
    if mark is None or mark[0] is not base or mark[1] is not x or dropout or autocasts(q.device):
        return None
    if torch_private.is_transformed_or_exported() or _is_small(x):
        return None
    if not (x.dtype == y.dtype == q.dtype == torch.float32 and x.device.type == q.device.type == "cpu"):
        return None
    w, bias = frozen_weight(base, y), torch_private.own_parameters(base.module).get(base.bias_name)
    return None if w is None else linear_low_rank(x, w, bias, q, p, float(scale))[0]


def _is_small(x: Tensor) -> bool:
    """Whether ``x`` is known to be small, whatever sizes it may have in the graph: a question must not narrow them."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # loads sympy, as the compiler has

    return statically_known_true(x.numel() < LEAST_NUMBERS)


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
    with autocast_off(x.device):
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
    with autocast_off(g.device):  # it may be on in backward alone
        grad_h = products.multiply(g2, p)
        grad_q, grad_pt = products.gradient(grad_h, rows, q, scale), products.gradient(h, g2, p.t(), scale)
    return grad_h.contiguous(), grad_q.contiguous(), grad_pt.t().contiguous()


@torch.library.custom_op(
    "tunerkit::linear_low_rank_input",
    mutates_args=(),
    schema="(Tensor g, Tensor w, Tensor grad_h, Tensor q, float scale) -> Tensor",
)
def gradient_of_input(g: Tensor, w: Tensor, grad_h: Tensor, q: Tensor, scale: float) -> Tensor:
    """Return g W + scale · grad_h Q, (..., in)."""
    with autocast_off(g.device):
        found = products.multiply(g.reshape(-1, g.shape[-1]), w).addmm_(grad_h, q, alpha=scale)
    return found.reshape(*g.shape[:-1], q.shape[1]).contiguous()


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
    if torch.is_grad_enabled():  # second derivatives, which backends without a graph of the backward have
        rows, g2 = x.reshape(-1, x.shape[-1]), ctx.scale * g.reshape(-1, g.shape[-1])
        grad_h = g2 @ p
        grad_x = (g.reshape(-1, g.shape[-1]) @ w + grad_h @ q).reshape(x.shape)
        return grad_x, None, None, grad_h.t() @ rows, g2.t() @ (rows @ q.t()), None
    grad_h, grad_q, grad_p = gradients_of_factors(g, x, h, q, p, ctx.scale)
    grad_x = gradient_of_input(g, w, grad_h, q, ctx.scale) if ctx.needs_input_grad[0] else None
    return grad_x, None, None, grad_q, grad_p, None


linear_low_rank.register_autograd(_backward, setup_context=_keep)
