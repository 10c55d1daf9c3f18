"""The fused form of a low-rank product for compiled models on a CPU, as custom operations that are not traced.

In the plain form, a compiler computes the base layer, the product and their sum one after the other, and likewise their
gradients. Here, one operation computes the base layer and accumulates the product in its output. The base's own output
becomes unused, so the compiler removes it. Another operation computes the gradients.
"""

from typing import Any

import torch
from torch import Tensor

from tunerkit.layers import products, torch_private
from tunerkit.layers.products import autocast_off, autocasts

# The number of input elements from which the operations are faster than the plain form (docs/evidence/speed.md).
LEAST_NUMBERS = 1 << 17


def add_traced(x: Tensor, w: Tensor, bias: Tensor | None, q: Tensor, p: Tensor, scale: float) -> Tensor | None:
    """Return x Wᵀ + bias + scale · P Q x by one operation; None if the traced graph needs the plain form.

    The plain form is needed under autocast, for a dtype other than fp32, off the CPU, and for an input that is known to
    be small. It is also needed in an exported graph, since importers do not have the operation, and under transforms
    of torch.func, for which the operation has no rule.
    """
    if autocasts(q.device) or torch_private.is_transformed_or_exported():
        return None
    if not (x.dtype == w.dtype == q.dtype == torch.float32 and x.device.type == q.device.type == "cpu"):
        return None
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # loads sympy; the compiler has it already

    # For dynamic sizes, a plain comparison would add a guard and specialize the graph.
    is_small = statically_known_true(x.numel() < LEAST_NUMBERS)
    return None if is_small else linear_low_rank(x, w, bias, q, p, float(scale))[0]


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
    "tunerkit::linear_low_rank_gradients",
    mutates_args=(),
    schema="(Tensor g, Tensor x, Tensor? w, Tensor h, Tensor q, Tensor p, float scale) -> (Tensor, Tensor, Tensor)",
)
def gradients(
    g: Tensor, x: Tensor, w: Tensor | None, h: Tensor, q: Tensor, p: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x (an empty tensor if W is None), Q and P; ``g`` (..., out) is the output's gradient."""
    rows, g2 = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    with autocast_off(g.device):  # autocast may be on in backward only
        grad_h = products.multiply(g2, p)
        grad_q, grad_pt = products.gradient(grad_h, rows, q, scale), products.gradient(h, g2, p.t(), scale)
        grad_x = (
            x.new_empty(0) if w is None else products.multiply(g2, w).addmm_(grad_h, q, alpha=scale).reshape(x.shape)
        )
    return grad_x.contiguous(), grad_q.contiguous(), grad_pt.t().contiguous()


@linear_low_rank.register_fake
def _(x: Tensor, w: Tensor, bias: Tensor | None, q: Tensor, p: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], len(w)), x.new_empty(x.numel() // x.shape[-1], len(q))


@gradients.register_fake
def _(
    g: Tensor, x: Tensor, w: Tensor | None, h: Tensor, q: Tensor, p: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(0 if w is None else x.shape), q.new_empty(q.shape), p.new_empty(p.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w, _, q, p, ctx.scale = inputs
    ctx.save_for_backward(x, w, q, p, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 6
    x, w, q, p, h = ctx.saved_tensors
    if torch.is_grad_enabled():  # second derivatives, in backends that do not trace the backward
        rows, g2 = x.reshape(-1, x.shape[-1]), ctx.scale * g.reshape(-1, g.shape[-1])
        grad_h = g2 @ p
        grad_x = (g.reshape(-1, g.shape[-1]) @ w + grad_h @ q).reshape(x.shape)
        return grad_x, None, None, grad_h.t() @ rows, g2.t() @ (rows @ q.t()), None
    to_x = ctx.needs_input_grad[0]
    grad_x, grad_q, grad_p = gradients(g, x, w if to_x else None, h, q, p, ctx.scale)
    return grad_x if to_x else None, None, None, grad_q, grad_p, None


linear_low_rank.register_autograd(_backward, setup_context=_keep)
