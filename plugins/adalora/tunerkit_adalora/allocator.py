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
    """Spend the budget ``keep`` where the scores are highest over all targets together; one mask (r_i,) per target.

    ``scores``: one tensor (r_i,) per target. ``costs``: what one triplet of each target costs, above 0, in the unit
    of ``keep`` (default 1, so exactly ``keep`` triplets stay). ``minimum``, ``maximum``: the fewest and the most
    triplets of each target, for as long as the budget allows it. ``lams``: λ (r_i,) of each target, where a triplet at
    λ = 0 is dead for good: it ranks last in its tier and never stays, even if the budget would reach that far.

    All triplets stand in one order: first the best ``minimum`` of each target, then those within its ``maximum``,
    then the rest, so that a maximum yields only where the budget can't be spent otherwise. Inside each of the
    three the higher score comes first; ties go to the earlier target, then to the lower index; −0.0 equals 0.0, NaN
    is lowest. The longest prefix of that order whose cost fits ``keep`` stays. As the order doesn't depend on
    ``keep``, masks nest while the budget falls on fixed scores.

    The masks are views of one tensor on the first score's device; the host waits for no result.
    """
    if not scores:
        return []
    sizes = [score.numel() for score in scores]
    flat = _ranked(torch.cat([score.to(scores[0].device) for score in scores]))
    alive = None if lams is None else torch.cat([lam.to(flat.device) for lam in lams]).ne(0)
    if alive is not None:
        flat = flat.where(alive, -torch.inf)
    bounds = torch.tensor(
        [
            sizes,
            [1] * len(sizes) if costs is None else costs,
            [0] * len(sizes) if minimum is None else minimum,
            sizes if maximum is None else maximum,
        ]
    )
    size, cost, least, most = bounds.to(flat.device, non_blocking=True)
    owner = torch.repeat_interleave(size, output_size=sum(sizes))

    by_score = torch.sort(flat, descending=True, stable=True).indices
    place = _places(by_score, owner, size)
    tier = torch.where(place < least[owner], 0, torch.where(place < most[owner], 1, 2))
    order = by_score[torch.sort(tier[by_score], stable=True).indices]
    spent = torch.cumsum(cost[owner[order]], dim=0)

    kept = torch.empty_like(owner, dtype=torch.bool)
    kept[order] = spent <= keep
    if alive is not None:
        kept &= alive
    return list(torch.split(kept, sizes))


def _ranked(scores: Tensor) -> Tensor:
    """Scores in fp32 or wider as a sort should see them: NaN the lowest there is, and one zero.

    Adding 0.0 turns −0.0 into 0.0: a radix sort compares bits, in which −0.0 lies below 0.0.
    """
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return torch.where(wide.isnan(), -torch.inf, wide) + 0.0


def _places(by_score: Tensor, owner: Tensor, size: Tensor) -> Tensor:
    """The place of each triplet among those of its own target, the best at 0: (n,) from a best-first order (n,)."""
    grouped = by_score[torch.sort(owner[by_score], stable=True).indices]
    start = torch.cumsum(size, dim=0) - size
    place = torch.empty_like(owner)
    place[grouped] = torch.arange(owner.numel(), device=owner.device) - start[owner]
    return place
