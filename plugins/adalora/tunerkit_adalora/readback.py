"""The results of an allocation that the host needs, read from the device in one transfer."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import attrs
import torch
from torch import Tensor


@attrs.frozen
class Readback:
    """What an allocation found.

    Attributes:
        left_out: Gradients that the averages left out since the last allocation.
        any_score: Whether any score is above 0.
        ranks: Live triplets of each mask.
    """

    left_out: int
    any_score: bool
    ranks: tuple[int, ...]


def read_back(left_out: Tensor, scores: Sequence[Tensor], masks: Sequence[Tensor]) -> Readback:
    """Wait for the device once, for all that the host needs.

    Args:
        left_out: Number of gradients left out; 0-d int64.
        scores: The score (r_i,) of each triplet, per target.
        masks: The bool masks (r_i,) of the allocation, per target.

    Returns:
        The values on the host.
    """
    kept = torch.cat(list(masks)).cumsum(0)
    above = (torch.cat(list(scores)) > 0).any()
    bad, above_zero, *counted = torch.cat([left_out.to(kept.device).view(1), above.view(1), kept]).tolist()
    ends = accumulate(len(mask) for mask in masks)
    totals = [0, *(counted[end - 1] if end else 0 for end in ends)]
    return Readback(bad, bool(above_zero), tuple(after - before for before, after in pairwise(totals)))
