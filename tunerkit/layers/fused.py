"""The fused low-rank product: one autograd node that adds to the base layer's output in place.

The plain form writes two tensors as large as the output and one as large as the input that nobody asked for: the
delta, the sum, and the input's gradient through the adapter, which is then added to the one through the base layer.
Here the product is accumulated where the output lies, and one node gives the input's gradient through both.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import ref

import attrs
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.module import register_module_forward_hook

from tunerkit.layers.base import BaseLayer
from tunerkit.libraries import torch_private

_MARK = "_tunerkit_fresh"


@attrs.frozen(eq=False)
class Fresh:
    """What is known of a tensor that comes straight from a base layer: whose it is, from which input, unchanged."""

    module: nn.Module
    x: "ref[Tensor]"
    version: int | None


def plain_form() -> AbstractContextManager[object]:
    """Compute every low-rank product in its plain form from now until the end of the block, to compare with."""
    # Nothing is fused where somebody sees the base layers' outputs: this hook does, and ignores them.
    return register_module_forward_hook(lambda module, args, output: None)


def mark_fresh(base: BaseLayer, x: object, y: object) -> bool:
    """Note on ``y`` that it comes straight from the forward of ``base`` on ``x``, unseen by anybody; whether it does.

    Only then may it be written to. The note is on this very tensor, for as long as it is not changed and until
    `unmark`: whatever an adapter makes of it is another one, and bears none.
    """
    module = base.module
    if not (base.linear and torch_private.has_single_hook(module) and "forward" not in vars(module)):
        return False
    if type(x) is not Tensor or type(y) is not Tensor or y.is_nested or y.layout != torch.strided:
        return False
    vars(y)[_MARK] = Fresh(module, ref(x), torch_private.version(y))
    return True


def unmark(y: Tensor) -> None:
    """Take the note off: the adapters have run."""
    vars(y).pop(_MARK, None)


def fresh(base: BaseLayer, x: Tensor, y: Tensor, q: Tensor, dtype: torch.dtype) -> Fresh | None:
    """What is known of ``y``, if `add_fused` may stand in for the plain form, which would multiply in ``dtype``.

    Not under what looks into the operations of a forward (tracing, functorch, forward-mode derivatives, selective
    checkpointing), nor for tensors that have arithmetic of their own.
    """
    found: Fresh | None = vars(y).get(_MARK)
    if found is None or found.module is not base.module or found.version != torch_private.version(y):
        return None
    if type(x) is not Tensor or y.dtype != dtype or not y.is_contiguous() or not x.device == y.device == q.device:
        return None
    return None if torch_private.is_observed() else found


def add_fused(
    base: BaseLayer, x: Tensor, y: Tensor, *, q: Tensor, p: Tensor, scale: float, lam: Tensor | None, own_input: bool
) -> Tensor:
    """Return y + scale · P diag(λ) Q x, written over ``y``; only where `fresh` says so.

    ``x`` (..., in) and ``y`` (..., out) in one dtype, ``q`` (r, in), ``lam`` (r,) or None, ``p`` (out, r) in theirs.
    ``own_input`` says that ``x`` is what the base layer read, so that one gradient serves both; else the two go apart.
    """
    weight = _frozen_weight(base, y) if own_input else None
    rows = x.reshape(-1, q.shape[1])
    by_column = is_thin(q, y)  # without gradients too, where nothing gains: outputs are to be the same bit for bit
    added: Tensor = _FusedLowRank.apply(rows, y, weight, q, p, lam, scale, by_column)  # type: ignore[no-untyped-call]
    return added


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on where ``device`` is. The meta device has none, and asking it raises."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def autocast_off(device: torch.device) -> AbstractContextManager[object]:
    """A block in which products keep the dtype of their factors."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def _frozen_weight(base: BaseLayer, y: Tensor) -> Tensor | None:
    """W (out, in), if the base layer has no gradient that would be lost by going past it, and is of the kind of ``y``.

    It may lie elsewhere: the replicas of DataParallel still know the module that they were copied from.
    """
    parameters = torch_private.own_parameters(base.module)
    weight, bias = parameters.get(base.weight_name), parameters.get(base.bias_name)
    frozen = all(own is None or (type(own) is nn.Parameter and not own.requires_grad) for own in (weight, bias))
    there = weight is not None and weight.dtype == y.dtype and weight.device == y.device
    return base.matrix() if frozen and there else None


class _FusedLowRank(Function):
    """out = y + s · P diag(λ) Q x, x (n, in); with ``w`` = W the node stands for the base layer too going backward.

    ``by_column`` says that P is copied into contiguous columns first, and that its gradient is computed like that.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        w: Tensor | None,
        q: Tensor,
        p: Tensor,
        lam: Tensor | None,
        scale: float,
        by_column: bool,
    ) -> Tensor:
        narrow_q, narrow_p = q.to(y.dtype), folded_by_column(p, lam, y) if by_column else _folded(p, lam, y)
        narrow_pt = narrow_p.t()
        h = x.mm(narrow_q.t())
        # Not y itself: autograd would have to know that it was changed, and would copy it where it is a view (a biased
        # linear layer's is). Whoever kept y for a backward of his own is still told, by the version that both share.
        out = y.detach()
        out.view(-1, p.shape[0]).addmm_(h, narrow_pt, alpha=scale)
        ctx.set_materialize_grads(False)
        ctx.scale = scale
        trained = any(ctx.needs_input_grad[3:6])
        kept_pt = narrow_pt if by_column else None
        ctx.save_for_backward(*((x, h) if trained else (None, None)), w, q, p, lam, narrow_q, narrow_p, kept_pt)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 8
        with autocast_off(g.device):  # it may be on now, and have been off in forward
            return _gradients(ctx, g)


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of what forward takes, for the one of the sum (..., out)."""
    x, h, w, q, p, lam, narrow_q, narrow_p, kept_pt = ctx.saved_tensors
    if torch.is_grad_enabled():  # to be differentiated again: what forward computed has to depend on its inputs
        narrow_q, narrow_p = q.to(g.dtype), _folded(p, lam, g)
        h = None if x is None else x.mm(narrow_q.t())
    to_x, to_y, _, to_q, to_p, to_lam, *_ = ctx.needs_input_grad
    s, g2 = ctx.scale, g.reshape(-1, p.shape[0])
    grad_x = grad_q = grad_p = grad_lam = None
    if to_x or to_q:
        grad_h = g2.mm(narrow_p)  # (n, r), without s: the products below take it in for nothing
    if to_x:
        grad_x = (grad_h * s).mm(narrow_q) if w is None else g2.mm(w).addmm_(grad_h, narrow_q, alpha=s)
    # With beta=0 the first argument gives nothing but its shape.
    if to_q:
        grad_q = torch.addmm(narrow_q, grad_h.t(), x, beta=0, alpha=s).to(q.dtype)
    if to_p or to_lam:
        # Of P diag(λ).
        if kept_pt is not None:
            grad_p = torch.addmm(kept_pt, h.t(), g2, beta=0, alpha=s).t().to(p.dtype)
        else:
            grad_p = torch.addmm(narrow_p, g2.t(), h, beta=0, alpha=s).to(p.dtype)
        if lam is not None:
            grad_lam = (grad_p * p).sum(0) if to_lam else None
            grad_p = grad_p * lam
        grad_p = grad_p.contiguous()  # as P lies, for whoever flattens gradients
    return grad_x, g if to_y and w is None else None, None, grad_q, grad_p, grad_lam, None, None


def is_thin(q: Tensor, y: Tensor) -> bool:
    """Whether backward gains from P by columns where the product is in the dtype of ``y``.

    A CPU's library multiplies a tall matrix with one of few columns two to three times as fast if those are
    contiguous, until a row of them fills a vector register of 64 bytes (docs/speed.md). A GPU's does not care.
    """
    return y.device.type == "cpu" and q.shape[0] * y.element_size() < 64


def _folded(p: Tensor, lam: Tensor | None, y: Tensor) -> Tensor:
    """P diag(λ) in the dtype of ``y``; rounded last, as the plain form rounds under autocast."""
    return (p if lam is None else p * lam).to(y.dtype)


def folded_by_column(p: Tensor, lam: Tensor | None, y: Tensor) -> Tensor:
    """The same with contiguous columns; nothing flows back through it."""
    folded = torch.empty_permuted(p.shape, (1, 0), dtype=y.dtype, device=y.device)
    return folded.copy_(p) if lam is None else torch.mul(p, lam, out=folded)
