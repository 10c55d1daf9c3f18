"""The importance of weights and of triplets: sensitivity, uncertainty, score (section 3.2 of the paper)."""

from collections.abc import Iterator, Sequence
from functools import reduce

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
    left_out = torch.zeros((), dtype=torch.int64, device=weights[0].device)
    for block in _blocks(weights):
        means, spreads = list(sensitivity[block]), list(uncertainty[block])
        left_out += _smooth_block_(weights[block], grads[block], means, spreads, beta1, beta2).to(left_out.device)
    return left_out


def triplet_scores(sensitivity: Triplets, uncertainty: Triplets) -> Tensor:
    """The score of each triplet of one SVD layer, (r,): s(λ_i) + mean s(P_·i) + mean s(Q_i·), s = Ī·Ū (Eq. 11-13)."""
    p = (sensitivity.p * uncertainty.p).mean(dim=0)
    lam = sensitivity.lam * uncertainty.lam
    q = (sensitivity.q * uncertainty.q).mean(dim=1)
    return lam + (p + q)


def _blocks(weights: Sequence[Tensor]) -> Iterator[slice]:
    """Neighbours taken together: few launches on an accelerator, temporaries that stay in the cache on a CPU."""
    limit = 2**16 if weights[0].device.type == "cpu" else 2**24
    start = held = 0
    for i, weight in enumerate(weights):
        if held and held + weight.numel() > limit:
            yield slice(start, i)
            start, held = i, 0
        held += weight.numel()
    yield slice(start, len(weights))


def _smooth_block_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    sensitivity: list[Tensor],
    uncertainty: list[Tensor],
    beta1: float,
    beta2: float,
) -> Tensor:
    """One block of `smooth_`; how many of its tensors were left out."""
    current = _sensitivities(weights, grads, sensitivity)
    finite = _all_finite(current)
    averaged = _running(sensitivity, current, beta1)
    torch._foreach_sub_(current, averaged)
    torch._foreach_abs_(current)
    widened = _running(uncertainty, current, beta2)
    for flag, old, new in zip([*finite, *finite], [*sensitivity, *uncertainty], [*averaged, *widened], strict=True):
        torch.where(flag.to(old.device), new, old, out=old)
    return finite.logical_not().sum()


def _sensitivities(weights: Sequence[Tensor], grads: Sequence[Tensor], averages: Sequence[Tensor]) -> list[Tensor]:
    """I of Eq. 8 in the averages' dtype, so that a product of two fp16 numbers doesn't underflow."""
    wide = [w.detach().to(average.dtype) for w, average in zip(weights, averages, strict=True)]
    slope = [g.to(average.dtype) for g, average in zip(grads, averages, strict=True)]
    product = list(torch._foreach_mul(wide, slope))
    torch._foreach_abs_(product)
    return product


def _all_finite(sensitivities: list[Tensor]) -> Tensor:
    """For each I, which is never negative, whether all of it is finite: (len,) bool on the first one's device.

    Asked of I and not of the gradient: a bad gradient always shows there (0·∞ is NaN), and so does an overflow of
    the product. The largest value says it in one pass: it can't overflow, and NaN passes through it.
    """
    # The largest of no values is an error, so tensors of rank 0 lend their place to a zero.
    largest = torch._foreach_max([t if t.numel() else t.new_zeros(1) for t in sensitivities])
    widest = reduce(torch.promote_types, {t.dtype for t in sensitivities})
    return torch.stack([value.to(sensitivities[0].device, widest) for value in largest]).isfinite()


def _running(averages: list[Tensor], values: list[Tensor], beta: float) -> list[Tensor]:
    """β·average + (1 − β)·value, as new tensors."""
    result = list(torch._foreach_mul(averages, beta))
    torch._foreach_add_(result, values, alpha=1 - beta)
    return result
