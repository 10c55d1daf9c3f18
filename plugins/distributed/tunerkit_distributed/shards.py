"""The layout of sharded tensors: how a dimension is split over ranks, and how shards are joined."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import attrs
import torch
from torch import Tensor


@attrs.frozen
class Cut:
    """The split of a tensor along one dimension. The first ranks have the longest shards; the last may be empty.

    Attributes:
        shape: The shape of the full tensor.
        dim: The dimension along which the tensor is split.
        processes: The number of ranks.
    """

    shape: tuple[int, ...]
    dim: int
    processes: int

    def rows(self, process: int) -> slice:
        """Return a rank's indices along `dim`: shards have ceil(n / ranks) indices, as in `torch.chunk`."""
        length = self.shape[self.dim]
        part = -(-length // self.processes)
        return slice(min(process * part, length), min((process + 1) * part, length))

    def part_shape(self, process: int) -> tuple[int, ...]:
        """Return the shape of a rank's shard."""
        rows = self.rows(process)
        return (*self.shape[: self.dim], rows.stop - rows.start, *self.shape[self.dim + 1 :])

    def part(self, whole: Tensor, process: int) -> Tensor:
        """Return a rank's shard of ``whole``, as a view."""
        rows = self.rows(process)
        return whole.narrow(self.dim, rows.start, rows.stop - rows.start)

    def size(self, process: int) -> int:
        """Return the number of values in a rank's shard."""
        return torch.Size(self.part_shape(process)).numel()


def longest(cuts: Sequence[Cut]) -> int:
    """Return the number of values in rank 0's shards of all tensors: no rank has more."""
    return sum(cut.size(0) for cut in cuts)


def packed(parts: Sequence[Tensor], length: int) -> Tensor:
    """Concatenate a rank's shards into a vector (length,), padded with 0."""
    vector = parts[0].new_zeros(length)
    used = sum(part.numel() for part in parts)
    torch.cat([part.reshape(-1) for part in parts], out=vector[:used])
    return vector


def joined(vectors: Tensor, cuts: Sequence[Cut]) -> list[Tensor]:
    """Join the shards of all ranks into whole tensors, as copies.

    Args:
        vectors: Each rank's vector from `packed`, (ranks, length).
        cuts: The splits of the tensors, in the order of packing.
    """
    pieces: list[list[Tensor]] = [[] for _ in cuts]
    for process, vector in enumerate(vectors):
        ends = [0, *accumulate(cut.size(process) for cut in cuts)]
        for held, cut, (start, end) in zip(pieces, cuts, pairwise(ends), strict=True):
            held.append(vector[start:end].view(cut.part_shape(process)))
    return [torch.cat(held, cut.dim) for held, cut in zip(pieces, cuts, strict=True)]
