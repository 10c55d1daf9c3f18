"""The fused form of a low-rank product, and the groups of layers that read one input.

The product is accumulated in the memory of the base layer's output, and one node computes the input's gradient through
both. Alone, each layer computes such a gradient, and autograd adds them up. In a group, such as q, k and v, each layer
hands its term to one node, which adds all of them to one tensor. The forward is the same bit for
bit. A group is what reads the same tensor object one after the other, in this forward.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.module import register_module_forward_hook

from tunerkit.layers import products, torch_private
from tunerkit.layers.base import BaseLayer
from tunerkit.layers.kinds import drop

_MARK = "_tunerkit_fresh"
# Width and numbers of an input from which a group takes less time than its layers alone (docs/evidence/speed.md).
LEAST_WIDTH, LEAST_NUMBERS = 1024, 1 << 16
# The size of the group that a base layer's product was in when it ran last, or why it was in none.
forms: "WeakKeyDictionary[BaseLayer, str | Size]" = WeakKeyDictionary()
PLAIN = "in the plain form"
SMALL = "with a small input"
CAST = "whose input is cast by autocast"
NO_GRADIENT = "without a gradient of the input"
DROPOUT = "with dropout"
OTHER_WEIGHT = "whose weight is trained, packed or of another dtype"
# A group waits for the gradients of all its outputs. Cross-attention may read one input in all layers of a decoder: in
# one group, they would all be kept until the last is there.
_MOST = 4


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
    """Whether ``y`` is x Wᵀ + b of plain tensors: no other hook changes it, nor has the module a forward of its own."""
    module = base.module
    if not (base.linear and torch_private.has_single_hook(module) and "forward" not in vars(module)):
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


# --- Groups ---


class Term(NamedTuple):
    """What one layer adds to the gradient of the input: g W + scale · grad_h Q, with grad_h = g P."""

    g: Tensor
    w: Tensor
    grad_h: Tensor
    q: Tensor
    scale: float


class Size:
    """How many layers are in a group. It outlives the group, and tells users what ran."""

    def __init__(self) -> None:
        self.layers = 0


class Group:
    """Layers of one forward that read one input, one after the other.

    Attributes:
        x: The input, until another group begins: a loss that is kept must not keep all inputs.
        size: How many layers have joined.
    """

    def __init__(self, x: Tensor) -> None:
        self.x: Tensor | None = x
        self.size = Size()
        self._writes = torch_private.version(x)
        # By backward pass: one that ended in an error may leave terms behind.
        self._waiting: dict[int, list[Term]] = {}
        self._rows: Tensor | None = None
        self._ticket: Tensor | None = None

    def takes(self, x: Tensor) -> bool:
        """Whether a further layer that reads ``x`` belongs to the group."""
        return self.x is x and self._writes == torch_private.version(x) and self.size.layers < _MOST

    def end(self) -> None:
        """Forget the input: the nodes keep what they need of it."""
        self.x = self._rows = None

    def rows(self, x: Tensor) -> Tensor:
        """The input as (n, in)."""
        if self._rows is None:
            self._rows = x.reshape(-1, x.shape[-1])
        return self._rows

    def ticket(self, x: Tensor) -> Tensor:
        """An input of each layer's node, without a meaning: so autograd runs the group's node after theirs."""
        if self._ticket is None:
            self._ticket = _apply(x, self._waiting)
        return self._ticket

    def add(self, term: Term) -> None:
        """Hand over a layer's term in backward."""
        self._waiting.setdefault(torch_private.backward_pass(), []).append(term)


class _Here(threading.local):
    """The group that a forward of this thread is in. Only its layers' nodes keep it alive."""

    group: "ref[Group] | None" = None


_here = _Here()


def join(x: Tensor) -> Group | None:
    """Join the group that reads ``x``, or begin one; None if ``x`` needs no gradient."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return None
    group = None if _here.group is None else _here.group()
    if group is None or not group.takes(x):
        if group is not None:
            group.end()
        group = Group(x)
        _here.group = ref(group)
    group.size.layers += 1
    return group


class _GradientOfInput(Function):
    """The input of a group. Its gradient is the sum of the terms, which the layers' nodes hand over before."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, waiting: dict[int, list[Term]]) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.waiting, ctx.shape = waiting, x.shape
        return x.new_empty(())

    @staticmethod
    def backward(ctx: Any, _: None) -> tuple[Tensor | None, None]:
        terms: list[Term] = ctx.waiting.pop(torch_private.backward_pass(), [])
        if not terms:
            return None, None
        with autocast_off(terms[0].g.device):
            return _sum(terms).view(ctx.shape), None


def _sum(terms: Sequence[Term]) -> Tensor:
    """The gradient of the input, (n, in)."""
    first, *others = terms
    total = products.multiply(first.g, first.w)
    for term in others:
        total = products.multiply(term.g, term.w, onto=total)
    if not others:
        return total.addmm_(first.grad_h, first.q, alpha=first.scale)
    if len({term.scale for term in terms}) == 1:
        grad_h, scale = [term.grad_h for term in terms], first.scale
    else:
        grad_h, scale = [term.grad_h * term.scale for term in terms], 1.0
    return total.addmm_(torch.cat(grad_h, dim=1), torch.cat([term.q for term in terms]), alpha=scale)


_apply = torch_private.apply_of(_GradientOfInput)


# --- The product ---


def add_fused(
    base: BaseLayer, x: Tensor, y: Tensor, *, q: Tensor, p: Tensor, scale: float, lam: Tensor | None, dropout: float
) -> Tensor:
    """Return y + scale · P diag(λ) Q x, overwriting ``y``. Call it only if ``y`` `is_fresh`.

    If ``x`` is the base layer's own input, one node computes its gradients through both, and through other layers that
    read it too.
    """
    mark: _Fresh = vars(y)[_MARK]
    weight = frozen_weight(base, y) if mark.x() is x and dropout == 0 else None
    group = _group_of(x, y, weight, dropout)
    if isinstance(group, str):
        forms[base] = group
        rows = drop(x.to(y.dtype), dropout).reshape(-1, q.shape[1])
        return _add(None, rows, y, weight, q, p, lam, scale, None)
    # A node of its own for the input's gradient takes longer where a layer is alone: what was, is taken to be again. It
    # computes the same numbers either way.
    before, forms[base] = forms.get(base), group.size
    if group.size.layers == 1 and isinstance(before, Size) and before.layers == 1:
        return _add(None, group.rows(x), y, weight, q, p, lam, scale, group)
    return _add(group.ticket(x), group.rows(x), y, weight, q, p, lam, scale, group)


def _group_of(x: Tensor, y: Tensor, weight: Tensor | None, dropout: float) -> Group | str:
    """The group that a layer joins, or why it joins none."""
    if weight is None:
        return DROPOUT if dropout else OTHER_WEIGHT
    if x.dtype != y.dtype:
        return CAST
    is_small = x.shape[-1] < LEAST_WIDTH or x.numel() < LEAST_NUMBERS
    return (SMALL if is_small else join(x)) or NO_GRADIENT


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
    """out = y + s · P diag(λ) Q x, with x (n, in). With ``w`` = W, backward includes the base layer's part.

    In a group, the gradient of x is the ``ticket``'s: the group's node computes it. What is saved is the same in both
    cases, so checkpointing may recompute a layer in another group, or alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        ticket: Tensor | None,
        x: Tensor,
        y: Tensor,
        w: Tensor | None,
        q: Tensor,
        p: Tensor,
        lam: Tensor | None,
        scale: float,
        group: Group | None,
    ) -> Tensor:
        narrow_q, narrow_pt = q.to(y.dtype), _folded(p, lam, y).t()
        h = products.multiply(x, narrow_q.t())
        # Not y itself: autograd would have to be notified of the change, and would copy y where it is a view, as a
        # biased linear layer's output is. The version counter is shared, so whoever saved y for backward gets an error.
        out = y.detach()
        out.view(-1, p.shape[0]).addmm_(h, narrow_pt, alpha=scale)
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.group, ctx.is_grouped = scale, group, ticket is not None
        kept = (x, h) if any(ctx.needs_input_grad[4:7]) else (None, None)
        ctx.save_for_backward(*kept, w, q, p, lam, narrow_q, narrow_pt)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 9
        with autocast_off(g.device):  # autocast may be on now although it was off in forward
            return _gradients(ctx, g)


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of forward's inputs, for the gradient ``g`` (..., out) of the sum."""
    x, h, w, q, p, lam, narrow_q, narrow_pt = ctx.saved_tensors
    if torch.is_grad_enabled():  # second derivatives: what forward computed must depend on its inputs
        narrow_q, narrow_pt = q.to(g.dtype), _folded(p, lam, g).t()
        h = None if x is None else products.multiply(x, narrow_q.t())
    _, to_x, to_y, _, to_q, to_p, to_lam, *_ = ctx.needs_input_grad
    s, g2 = ctx.scale, g.reshape(-1, p.shape[0])
    grad_x = grad_q = grad_p = grad_lam = None
    if to_x or to_q:
        grad_h = products.multiply(g2, narrow_pt.t())  # without s: the products below include it at no cost
    if ctx.is_grouped:
        if torch_private.will_run(ctx.next_functions[0][0]):
            ctx.group.add(Term(g2, w, grad_h, narrow_q, s))
    elif to_x and w is None:
        grad_x = (grad_h * s).mm(narrow_q)
    elif to_x:
        grad_x = products.multiply(g2, w).addmm_(grad_h, narrow_q, alpha=s)
    if to_q:
        grad_q = products.gradient(grad_h, x, narrow_q, s).to(q.dtype)
    if to_p or to_lam:
        grad_p = products.gradient(h, g2, narrow_pt, s).t().to(p.dtype)  # so far of P diag(λ)
        if lam is not None:
            grad_lam = (grad_p * p).sum(0) if to_lam else None
            grad_p = grad_p * lam
        grad_p = grad_p.contiguous()  # the layout of P, for optimizers that flatten gradients
    return None, grad_x, g if to_y and w is None else None, None, grad_q, grad_p, grad_lam, None, None


def _folded(p: Tensor, lam: Tensor | None, y: Tensor) -> Tensor:
    """P diag(λ), rounded to the dtype of ``y`` last, as the plain form rounds under autocast."""
    return (p if lam is None else p * lam).to(y.dtype)


_add: Callable[..., Tensor] = torch_private.apply_of(_FusedLowRank)
