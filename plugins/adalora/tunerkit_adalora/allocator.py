"""The allocation of a budget: scores of all triplets in, masks out."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def allocate(
    scores: Sequence[Tensor],
    keep: int,
    *,
    costs: Sequence[int] | None = None,
    minimum: Sequence[int] | None = None,
    maximum: Sequence[int] | None = None,
    lams: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Spend the budget ``keep`` where the scores are highest over all targets together.

    All triplets form one ranking: first the best ``minimum`` of each target, then those within its ``maximum``, then
    the rest. So a maximum yields only where the budget cannot be spent otherwise. Within each of these tiers the higher
    score comes first; ties go to the earlier target, then to the lower index. −0.0 equals 0.0, and NaN is lowest. The
    longest prefix of the ranking whose cost fits ``keep`` stays. The ranking does not depend on ``keep``, so masks nest
    while the budget falls on fixed scores. The host waits for no result.

    Args:
        scores: One tensor (r_i,) per target.
        keep: The budget, in the unit of ``costs``.
        costs: Cost of one triplet of each target, above 0; by default 1, so that exactly ``keep`` triplets stay.
        minimum: The fewest triplets of each target, for as long as the budget allows it; by default 0.
        maximum: The most triplets of each target; by default all.
        lams: λ (r_i,) of each target, where a triplet at λ = 0 is dead for good. Such a triplet ranks last in its tier
            and never stays, even if the budget would reach that far.

    Returns:
        One bool mask (r_i,) per target: views of one tensor, on the first score's device.
    """
    if not scores:
        return []
    sizes = [score.numel() for score in scores]
    nothing, one = [0] * len(sizes), [1] * len(sizes)
    limits = torch.tensor([sizes, costs or one, minimum or nothing, maximum or sizes])
    flat = torch.cat([score.to(scores[0].device) for score in scores])
    alive = None if lams is None else torch.cat([lam.to(flat.device) for lam in lams]).ne(0)
    return list(torch.split(_keep(flat, keep, limits, alive, total=sum(sizes)), sizes))


def _keep(scores: Tensor, keep: int, limits: Tensor, alive: Tensor | None, *, total: int) -> Tensor:
    """The mask (n,) over all triplets; ``limits`` (4, targets) are size, cost, minimum and maximum of each target."""
    flat = _sortable(scores)
    if alive is not None:
        flat = flat.where(alive, -torch.inf)
    size, cost, least, most = limits.to(flat.device, non_blocking=True)
    owner = torch.repeat_interleave(size, output_size=total)

    by_score = torch.sort(flat, descending=True, stable=True).indices
    standing = _standings(by_score, owner, size)
    tier = torch.where(standing < least[owner], 0, torch.where(standing < most[owner], 1, 2))
    order = by_score[torch.sort(tier[by_score], stable=True).indices]
    spent = torch.cumsum(cost[owner[order]], dim=0)

    kept = torch.empty_like(owner, dtype=torch.bool)
    kept[order] = spent <= keep
    if alive is not None:
        kept &= alive
    return kept


def _sortable(scores: Tensor) -> Tensor:
    """Scores in fp32 or wider as a sort should see them: NaN lowest, and only one zero.

    Adding 0.0 turns −0.0 into 0.0: a radix sort compares bits, in which −0.0 lies below 0.0.
    """
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return torch.where(wide.isnan(), -torch.inf, wide) + 0.0


def _standings(by_score: Tensor, owner: Tensor, size: Tensor) -> Tensor:
    """The standing (n,) of each triplet among those of its own target, 0 for the best, from a best-first order (n,)."""
    grouped = by_score[torch.sort(owner[by_score], stable=True).indices]
    start = torch.cumsum(size, dim=0) - size
    standing = torch.empty_like(owner)
    standing[grouped] = torch.arange(owner.numel(), device=owner.device) - start[owner]
    return standing
