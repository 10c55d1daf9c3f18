"""The importance of weights and of triplets: sensitivity, uncertainty, score (section 3.2 of the paper)."""

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor


@attrs.frozen(eq=False)
class Triplets:
    """One value for every weight of an SVD layer, shaped like ΔW = P Λ Q: p (out, r), lam (r,), q (r, in)."""

    p: Tensor
    lam: Tensor
    q: Tensor


def new_averages(weights: Sequence[Tensor]) -> list[Tensor]:
    """Averages before the first step: zeros shaped like ``weights``, in fp32 or wider.

    A score is a product of two averages of small numbers; in fp16 it underflows and everything looks unimportant.
    """
    return [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights]


@torch.no_grad()
def smooth_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    sensitivity: Sequence[Tensor],
    uncertainty: Sequence[Tensor],
    *,
    beta1: float,
    beta2: float,
) -> Tensor:
    """Update the running averages Ī (``sensitivity``) and Ū (``uncertainty``) in place; four parallel lists.

    Eq. 8:  I = |w · ∂L/∂w|;  Eq. 9:  Ī ← β1 Ī + (1 − β1) I;  Eq. 10:  U = |I − Ī|,  Ū ← β2 Ū + (1 − β2) U,
    with the new Ī in Eq. 10.

    A tensor whose I isn't finite throughout is left out as a whole: its averages stay as they were. Returns how many
    were left out, as a 0-d int64 tensor on the first weight's device; nothing here waits for the device.
    """
    if not weights:
        return torch.zeros((), dtype=torch.int64)
    current = _sensitivities(weights, grads, sensitivity)
    finite = _all_finite(current)
    averaged = _running(sensitivity, current, beta1)
    distance = torch._foreach_sub(current, averaged)
    torch._foreach_abs_(distance)
    widened = _running(uncertainty, distance, beta2)
    for flag, old, new in zip([*finite, *finite], [*sensitivity, *uncertainty], [*averaged, *widened], strict=True):
        torch.where(flag.to(old.device), new, old, out=old)
    return finite.logical_not().sum()


def triplet_scores(sensitivity: Triplets, uncertainty: Triplets) -> Tensor:
    """The score of each triplet of one SVD layer, (r,): s(λ_i) + mean s(P_·i) + mean s(Q_i·), s = Ī·Ū (Eq. 11-13)."""
    p = (sensitivity.p * uncertainty.p).mean(dim=0)
    lam = sensitivity.lam * uncertainty.lam
    q = (sensitivity.q * uncertainty.q).mean(dim=1)
    return lam + (p + q)


def _sensitivities(weights: Sequence[Tensor], grads: Sequence[Tensor], averages: Sequence[Tensor]) -> list[Tensor]:
    """I of Eq. 8 in the averages' dtype, so that a product of two fp16 numbers doesn't underflow."""
    wide = [w.detach().to(average.dtype) for w, average in zip(weights, averages, strict=True)]
    slope = [g.to(average.dtype) for g, average in zip(grads, averages, strict=True)]
    product = list(torch._foreach_mul(wide, slope))
    torch._foreach_abs_(product)
    return product


def _all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """For each tensor whether all of its values are finite: (len,) bool on the first one's device.

    Asked of I and not of the gradient: a bad gradient always shows there (0·∞ is NaN), and so does an overflow of
    the product. The largest absolute value says it in one pass: it can't overflow, and NaN passes through it.
    """
    # The largest value of no values is an error, so tensors of rank 0 lend their place to a zero.
    filled = [t if t.numel() else t.new_zeros(1) for t in tensors]
    largest = torch._foreach_norm(filled, float("inf"))
    return torch.stack([value.to(tensors[0].device, torch.float64) for value in largest]).isfinite()


def _running(averages: Sequence[Tensor], values: Sequence[Tensor], beta: float) -> list[Tensor]:
    """β·average + (1 − β)·value, as new tensors."""
    result = list(torch._foreach_mul(list(averages), beta))
    torch._foreach_add_(result, torch._foreach_mul(list(values), 1 - beta))
    return result
