"""Where the shards of a tensor lie: how a dimension is cut over processes, and how the whole is put together."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import attrs
import torch
from torch import Tensor


@attrs.frozen
class Cut:
    """How a tensor is cut along one dimension. The first processes hold the longest parts, the last may hold nothing.

    Attributes:
        shape: The shape of the whole.
        dim: The dimension that is cut.
        processes: Over how many processes.
    """

    shape: tuple[int, ...]
    dim: int
    processes: int

    def rows(self, process: int) -> slice:
        """Which indices along `dim` a process holds: parts of ceil(n / processes), as `torch.chunk` cuts."""
        length = self.shape[self.dim]
        part = -(-length // self.processes)
        return slice(min(process * part, length), min((process + 1) * part, length))

    def part_shape(self, process: int) -> tuple[int, ...]:
        """The shape of the part that a process holds."""
        rows = self.rows(process)
        return (*self.shape[: self.dim], rows.stop - rows.start, *self.shape[self.dim + 1 :])

    def part(self, whole: Tensor, process: int) -> Tensor:
        """The part of ``whole`` that a process holds, as a view."""
        rows = self.rows(process)
        return whole.narrow(self.dim, rows.start, rows.stop - rows.start)

    def size(self, process: int) -> int:
        """How many numbers a process holds."""
        return torch.Size(self.part_shape(process)).numel()


def longest(cuts: Sequence[Cut]) -> int:
    """How many numbers of all tensors together the first process holds. No other holds more."""
    return sum(cut.size(0) for cut in cuts)


def packed(parts: Sequence[Tensor], length: int) -> Tensor:
    """Put the parts that one process holds into a vector of ``length`` numbers. What is too much is 0."""
    vector = parts[0].new_zeros(length)
    used = sum(part.numel() for part in parts)
    torch.cat([part.reshape(-1) for part in parts], out=vector[:used])
    return vector


def joined(vectors: Tensor, cuts: Sequence[Cut]) -> list[Tensor]:
    """Put whole tensors together, in memory of their own.

    Args:
        vectors: What `packed` made in each process, (processes, length).
        cuts: The cuts of the tensors, in the order in which they were packed.
    """
    pieces: list[list[Tensor]] = [[] for _ in cuts]
    for process, vector in enumerate(vectors):
        ends = [0, *accumulate(cut.size(process) for cut in cuts)]
        for held, cut, (start, end) in zip(pieces, cuts, pairwise(ends), strict=True):
            held.append(vector[start:end].view(cut.part_shape(process)))
    return [torch.cat(held, cut.dim) for held, cut in zip(pieces, cuts, strict=True)]
