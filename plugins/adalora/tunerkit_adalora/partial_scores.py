"""Scores of triplets whose weights are cut over several processes: what this process's pieces contribute to them."""

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
    """Compute contributions that add up, over the processes, to what `triplet_scores` is for whole weights (Eq. 11-13).

    A mean over a matrix's entries is a sum of shares: P is cut over its rows, so each process adds up its part of every
    column, and λ and Q are cut over the triplets, so each process contributes those that it holds.

    Args:
        stacks: The averages of the pieces that this process holds.
        shapes: The whole shape of each weight in the flat list.
        starts: The dimension along which each weight is cut, and the first index of the piece in it.

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
    """Put a piece (k,) into a vector (size,) that is 0 elsewhere."""
    whole = piece.new_zeros(size)
    whole[start : start + len(piece)] = piece
    return whole


def placed_lams(
    lams: Sequence[Tensor], shapes: Sequence[Sequence[int]], starts: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """Put pieces of λ into whole vectors, which add up to λ over the processes."""
    return [placed(lam, shape[0], _start(start, 0)) for lam, shape, start in zip(lams, shapes, starts, strict=True)]


def _start(start: tuple[int, int], along: int) -> int:
    dim, first = start
    return first if dim == along else 0
