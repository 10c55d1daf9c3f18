"""When ranks grow, where, and in which directions: functions that know no adapter."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize


def growths_by(step: int, total: int, growths: int, until: float) -> int:
    """Count the growths up to a step: at equal distances, the last one after a share of training.

    Args:
        step: The optimizer step.
        total: The length of training in steps.
        growths: How many there are.
        until: The share of training after which there are no more.

    Returns:
        Their number; -1 before the step that only looks where to grow.
    """
    return min(step * (growths + 1) // max(1, int(until * total)), growths + 1) - 1


def budget_by(growth: int, growths: int, most: Sequence[int], average: int) -> int:
    """Return the sum of the ranks after a growth, by equal parts from 1 at each target.

    Args:
        growth: The number of the growth.
        growths: How many there are.
        most: How many triplets fit at each target.
        average: The average rank after all of them, or as near as what fits comes to it.
    """
    final = min(average * len(most), sum(most))
    return len(most) + (final - len(most)) * max(0, growth) // growths


def looking(a: Tensor, b: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of B A + (P − P) Q̂ + P̂ (Q − Q), where only the differences have gradients.

    Args:
        a: A, (r, in).
        b: B, (out, r).
        left: P, (out, w). Its columns of length 1 are P̂.
        right: Q, (w, in). Its rows of length 1 are Q̂.

    Returns:
        Factors (r + 2w, in) and (out, r + 2w), whose product is B A.
    """
    p, q = left.detach(), right.detach()
    rows, columns = normalize(q.float()).to(q), normalize(p.float(), dim=0).to(p)  # the guard of normalize is 0 in fp16
    return torch.cat([a, rows, right - q]), torch.cat([b, left - p, columns], dim=1)


def largest(a: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the largest singular triplets of a gradient G in directions that the rows of A cannot follow.

    Args:
        a: A, (r, in).
        left: G Q̂ᵀ, (out, w), of an estimate Q̂ (w, in) of the right singular vectors.
        right: P̂ᵀ G, (w, in), of an estimate P̂ (out, w) of the left ones.

    Returns:
        A better P̂, a better Q̂, and the singular values of P̂ᵀ G outside of the rows of A, (w,), the largest first.
    """
    a, left, right = (each.float().nan_to_num(0, 0, 0) for each in (a, left, right))
    own = torch.linalg.qr(a.T).Q
    _, scores, rows = torch.linalg.svd(right - right @ own @ own.T, full_matrices=False)
    return torch.linalg.qr(left).Q, rows, scores


def further(rows: Tensor, count: int, seed: int) -> Tensor:
    """Return further rows of A, (count, in), as long as LoRA's.

    Args:
        rows: The directions to take first, (w, in).
        count: How many are due. Where there are not enough directions, random ones are taken.
        seed: The seed of these.
    """
    drawn = torch.randn(count, rows.shape[1], generator=torch.Generator().manual_seed(seed))
    return torch.cat([rows, normalize(drawn).to(rows)])[:count] / 3**0.5


def spread(scores: Sequence[Sequence[float]], rooms: Sequence[int], due: int) -> Counter[int]:
    """Give each target as many triplets as it has of the largest scores.

    Args:
        scores: The scores of the next triplets of each target, the largest first. Further ones count as 0.
        rooms: How many triplets each target can take.
        due: How many there are to give. All are given if there is room.

    Returns:
        The number of triplets by the target's place. Equal scores go to as many targets as possible, the first first.
    """
    order = (
        (-each[i] if i < len(each) else 0.0, i, place)
        for place, (each, room) in enumerate(zip(scores, rooms, strict=True))
        for i in range(min(room, due))
    )
    return Counter(place for *_, place in sorted(order)[:due])
