"""The fused form of a low-rank product.

The product is accumulated in the memory of the base layer's output, and one node computes the input's gradient through
both. It saves what it multiplied by under names of its own: parameters may be merged, swapped or cast before backward.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.module import register_module_forward_hook

from tunerkit.layers import products, torch_private
from tunerkit.layers.base import BaseLayer
from tunerkit.layers.kinds import drop
from tunerkit.layers.weights import code_owner, is_listed

_MARK = "_tunerkit_fresh"


def product_dtype(x: Tensor, q: Tensor) -> torch.dtype:
    """The dtype of the plain form's products: autocast's, which does not apply to float64, or else Q's."""
    if autocasts(q.device) and torch.float64 not in (x.dtype, q.dtype):
        return torch.get_autocast_dtype(q.device.type)
    return q.dtype


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for the type of ``device``. The meta device has none, and querying it would raise."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def autocast_off(device: torch.device) -> AbstractContextManager[object]:
    """A block without autocast: products keep the dtype of their factors."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


# --- Outputs that may be overwritten ---


class _Fresh(NamedTuple):
    """The mark of a tensor that comes straight from a base layer: the module, its input, the tensor's version."""

    module: nn.Module
    x: "ref[Tensor]"
    version: int | None


def plain_form() -> AbstractContextManager[object]:
    """Compute every low-rank product in its plain form until the end of the block, as a reference for tests."""
    # Nothing is fused where another hook sees the base layers' outputs. This one does, and ignores them.
    return register_module_forward_hook(lambda module, args, output: None)


def mark_fresh(base: BaseLayer, x: Tensor, y: Tensor) -> bool:
    """Mark ``y`` as coming straight from the forward of ``base`` on ``x``, if it does; whether it was marked.

    Only a marked tensor may be overwritten. The mark is valid until the tensor changes or `unmark` removes it. It is on
    this object alone: a tensor that an adapter computes from it has none.
    """
    # Where a graph was broken, dynamo may trace this by itself, for a forward that isn't traced.
    if torch.compiler.is_compiling() or not is_straight(base, x, y):
        return False
    vars(y)[_MARK] = _Fresh(base.module, ref(x), torch_private.version(y))
    return True


def is_straight(base: BaseLayer, x: object, y: object) -> bool:
    """Whether ``y`` is x Wᵀ + b of plain tensors: no other hook changes it, and nothing has replaced the forward."""
    module = base.module
    if not (base.linear and torch_private.has_single_hook(module) and "forward" not in vars(module)):
        return False
    if torch_private.is_intercepted() or not (base.forwards == () or is_listed(code_owner(module), base.forwards)):
        return False
    return type(x) is Tensor and type(y) is Tensor and not y.is_nested and y.layout == torch.strided


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


# --- The product ---


def add_fused(
    base: BaseLayer, x: Tensor, y: Tensor, *, q: Tensor, p: Tensor, scale: float, lam: Tensor | None, dropout: float
) -> Tensor:
    """Return y + scale · P diag(λ) Q x, overwriting ``y``. Call it only if ``y`` `is_fresh`.

    If ``x`` is the base layer's own input, one node computes its gradients through both.
    """
    mark: _Fresh = vars(y)[_MARK]
    weight = frozen_weight(base, y) if mark.x() is x and dropout == 0 else None
    rows = drop(x.to(y.dtype), dropout).reshape(-1, q.shape[1])
    return _add(rows, y, weight, q, p, lam, scale)


def frozen_weight(base: BaseLayer, y: Tensor) -> Tensor | None:
    """W (out, in), if weight and bias are frozen, so that bypassing the base layer in backward loses no gradient.

    None also if W differs from ``y`` in dtype or device: DataParallel's replicas hold the original module.
    """
    parameters = torch_private.own_parameters(base.module)
    weight, bias = parameters.get(base.weight_name), parameters.get(base.bias_name)
    frozen = all(own is None or (type(own) is nn.Parameter and not own.requires_grad) for own in (weight, bias))
    there = weight is not None and weight.dtype == y.dtype and weight.device == y.device
    return base.matrix() if frozen and there else None


class _FusedLowRank(Function):
    """out = y + s · P diag(λ) Q x, with x (n, in). With ``w`` = W, backward includes the base layer's part."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, w: Tensor | None, q: Tensor, p: Tensor, lam: Tensor | None, scale: float
    ) -> Tensor:
        # Aliases have these values also after the ``data`` of a parameter was replaced.
        seen_p, seen_lam = (p, None) if lam is None else (p.detach(), lam.detach())
        narrow_q, narrow_pt = q.detach().to(y.dtype), _folded(seen_p, seen_lam, y).t()
        h = products.multiply(x, narrow_q.t())
        # Not y itself: autograd would have to be notified of the change, and would copy y where it is a view, as a
        # biased linear layer's output is. The version counter is shared, so whoever saved y for backward gets an error.
        out = y.detach()
        out.view(-1, p.shape[0]).addmm_(h, narrow_pt, alpha=scale)
        ctx.set_materialize_grads(False)
        ctx.scale = scale
        kept = (x, h) if any(ctx.needs_input_grad[3:6]) else (None, None)
        seen = (None, None) if lam is None else (seen_p, seen_lam)
        ctx.save_for_backward(*kept, None if w is None else w.detach(), narrow_q, narrow_pt, *seen, q, p, lam)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 7
        with autocast_off(g.device):  # autocast may be on now although it was off in forward
            return _gradients(ctx, g)


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of forward's inputs, for the gradient ``g`` (..., out) of the sum. Autograd casts them."""
    x, h, w, narrow_q, narrow_pt, p, lam, *parameters = ctx.saved_tensors
    if torch.is_grad_enabled():  # second derivatives: what forward computed must depend on its inputs
        narrow_q, narrow_pt, p, lam = _differentiable(narrow_q, narrow_pt, p, lam, *parameters)
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
        grad_p = products.gradient(h, g2, narrow_pt, s).t()  # so far of P diag(λ)
        if lam is not None:
            grad_lam = (grad_p * p).sum(0) if to_lam else None
            grad_p = grad_p * lam
        grad_p = grad_p.contiguous()  # the layout of P, for optimizers that flatten gradients
    return grad_x, g if to_y and w is None else None, None, grad_q, grad_p, grad_lam, None


def _differentiable(
    narrow_q: Tensor, narrow_pt: Tensor, seen_p: Tensor, seen_lam: Tensor, q: Tensor, p: Tensor, lam: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What forward multiplied by, with the values that it saw, as functions of the parameters."""
    narrow_q = _as_seen(q.to(narrow_q.dtype), narrow_q)
    if lam is None:
        return narrow_q, _as_seen(p.to(narrow_pt.dtype).t(), narrow_pt), p, None
    p, lam = _as_seen(p, seen_p), _as_seen(lam, seen_lam)
    return narrow_q, _folded(p, lam, narrow_pt).t(), p, lam


class _AsSeen(Function):
    """The values ``seen`` with the gradient of ``parameter``, which may have other values by now."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, seen: Tensor) -> Tensor:
        return seen.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


def _folded(p: Tensor, lam: Tensor | None, y: Tensor) -> Tensor:
    """P diag(λ), rounded to the dtype of ``y`` last, as the plain form rounds under autocast."""
    return (p if lam is None else p * lam).to(y.dtype)


_add: Callable[..., Tensor] = torch_private.apply_of(_FusedLowRank)
_as_seen: Callable[..., Tensor] = torch_private.apply_of(_AsSeen)
