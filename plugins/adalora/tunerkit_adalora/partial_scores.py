"""Compute the contributions of this process's shards to the scores of triplets."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tunerkit_adalora.importance import Part, Stack

# The dimension of each weight that counts triplets.
_TRIPLETS = {Part.P: 1, Part.LAM: 0, Part.Q: 0}


@torch.no_grad()
def partial_scores(
    stacks: Sequence[Stack], shapes: Sequence[Sequence[int]], starts: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """Return this process's contributions; over all processes they sum to `triplet_scores` (Eq. 11-13).

    P is sharded along its rows, so each process sums its part of every column. λ and Q are sharded along the triplets,
    so each process contributes its own triplets.

    Args:
        stacks: The averages of this process's shards.
        shapes: The full shape of each weight in the flat list.
        starts: The dimension along which each weight is sharded, and the shard's first index in it.

    Returns:
        One tensor (r,) for each layer.
    """
    found = [torch.zeros(()) for _ in shapes]
    for stack in stacks:
        products = (stack.sensitivity * stack.uncertainty).unbind()
        for index, product in zip(stack.members, products, strict=True):
            along = _TRIPLETS[stack.part]
            if product.ndim == 2:
                product = product.sum(1 - along) / shapes[index][1 - along]
            found[index] = placed(product, shapes[index][along], _start(starts[index], along))
    count = len(Part)
    return [lam + (p + q) for p, lam, q in zip(*(found[part::count] for part in Part), strict=True)]


def placed(piece: Tensor, size: int, start: int) -> Tensor:
    """Return a vector (size,) with the shard (k,) at index ``start``, and zeros elsewhere."""
    whole = piece.new_zeros(size)
    whole[start : start + len(piece)] = piece
    return whole


def placed_lams(
    lams: Sequence[Tensor], shapes: Sequence[Sequence[int]], starts: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """Return λ of each layer, with zeros outside this process's shards; over all processes they sum to λ."""
    return [placed(lam, shape[0], _start(start, 0)) for lam, shape, start in zip(lams, shapes, starts, strict=True)]


def _start(start: tuple[int, int], along: int) -> int:
    dim, first = start
    return first if dim == along else 0
