"""The orthogonality regularizer R(P, Q) of Eq. 4, with its gradient written by hand."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import attrs
import torch
from torch import Tensor

from tunerkit.errors import ConfigError, closest

Form = Literal["paper", "reference"]
Pair = tuple[Tensor, Tensor]


def penalty(pairs: Sequence[Pair], *, form: Form) -> Tensor:
    """Compute R(P, Q), the distance of P's columns and Q's rows from orthonormality.

    Args:
        pairs: P (out, r) and Q (r, in) of each layer.
        form: "paper": Σ ‖PᵀP − I‖²_F + ‖QQᵀ − I‖²_F (Eq. 4), summed over the pairs. "reference": the mean of the
            unsquared norms over all matrices, two per pair, as in both public implementations.

    Returns:
        R, 0-d.

    Raises:
        ConfigError: If the form is unknown.
    """
    _check(form)
    if not pairs:
        return torch.zeros(())
    device = pairs[0][0].device
    excess = [_excess(group.stacked(), columns=group.columns) for group in _groups(pairs)]
    norms = torch.cat([_norm(e).flatten().to(device) for e in excess])
    return norms.square().sum() if form == "paper" else norms.mean()


@torch.no_grad()
def add_gradient_(pairs: Sequence[Pair], *, gamma: float, form: Form, grad_scale: Tensor | None = None) -> None:
    """Add γ·∂R/∂P and γ·∂R/∂Q to the gradients of ``pairs``.

    ∂‖PᵀP − I‖²_F/∂P = 4 P (PᵀP − I) and ∂‖QQᵀ − I‖²_F/∂Q = 4 (QQᵀ − I) Q. For "reference" this is divided by twice
    the norm and by the number of matrices, and is 0 where the norm is 0.

    Frozen matrices, and matrices without a gradient in this step, are skipped. They still count in the mean, so that
    the effect of γ on a matrix does not depend on the others.

    Args:
        pairs: P (out, r) and Q (r, in) of each layer.
        gamma: γ.
        form: The form of R, as for `penalty`.
        grad_scale: The scale of the gradients (0-d), or None for 1.

    Raises:
        ConfigError: If the form is unknown.
    """
    _check(form)
    if gamma == 0 or not pairs:
        return
    weight = 4 * gamma if form == "paper" else 2 * gamma / (2 * len(pairs))
    for group in _groups(pairs, trained_only=True):
        stacked = group.stacked()
        excess = _excess(stacked, columns=group.columns)
        if form == "reference":
            # A norm of 0 divides only zeros. The clamp keeps a norm that underflows from inflating the rest.
            excess.div_(_norm(excess).clamp_min_(torch.finfo(excess.dtype).eps))
        excess.mul_(weight)
        if grad_scale is not None:
            excess.mul_(grad_scale.to(excess.device))
        group.add_(stacked.bmm(excess) if group.columns else excess.bmm(stacked))


@attrs.frozen(eq=False)
class _Group:
    """Matrices of one shape, dtype and device, which are processed together, in as many operations as a single one."""

    columns: bool  # P, orthonormal by columns; else Q, by rows
    matrices: list[Tensor]

    def stacked(self) -> Tensor:
        """Return the matrices as one tensor (count, rows, columns), in fp32 or wider."""
        stacked = torch.stack(self.matrices)
        return stacked.to(torch.promote_types(stacked.dtype, torch.float32))

    def add_(self, slope: Tensor) -> None:
        """Add ``slope`` (count, rows, columns) to the matrices' gradients."""
        grads = [matrix.grad for matrix in self.matrices if matrix.grad is not None]
        torch._foreach_add_(grads, list(slope.to(grads[0].dtype).unbind()))


def _groups(pairs: Iterable[Pair], *, trained_only: bool = False) -> list[_Group]:
    found: dict[tuple[bool, object, object, object, object], list[Tensor]] = defaultdict(list)
    for pair in pairs:
        for columns, matrix in zip((True, False), pair, strict=True):
            grad = matrix.grad if matrix.requires_grad else None
            if grad is not None or not trained_only:
                grad_dtype = None if grad is None else grad.dtype
                found[columns, matrix.shape, matrix.dtype, matrix.device, grad_dtype].append(matrix)
    return [_Group(key[0], matrices) for key, matrices in found.items()]


def _excess(stacked: Tensor, *, columns: bool) -> Tensor:
    """Return PᵀP − I or QQᵀ − I for each matrix of a stack: (count, r, r)."""
    rank = stacked.shape[2 if columns else 1]
    one = torch.eye(rank, dtype=stacked.dtype, device=stacked.device)
    return torch.baddbmm(one, *((stacked.mT, stacked) if columns else (stacked, stacked.mT)), beta=-1)


def _norm(excess: Tensor) -> Tensor:
    """Return ‖E‖_F of each matrix E of a stack (count, r, r): (count, 1, 1)."""
    norm: Tensor = torch.linalg.vector_norm(excess, dim=(1, 2), keepdim=True)
    return norm


def _check(form: str) -> None:
    known = get_args(Form)
    if form not in known:
        allowed = ", ".join(known)
        raise ConfigError([f"$.orthogonality: expected one of {allowed}, got {form!r}{closest(form, known)}"])
