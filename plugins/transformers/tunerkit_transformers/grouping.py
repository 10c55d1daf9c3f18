"""Batches of rows of similar length, in a random order that is the same after resuming."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch.utils.data import Sampler

_AMONG: Final = 50  # batches: rows are sorted among as many as fill these


class GroupedByLength(Sampler[int]):
    """Samples rows in groups of similar length, in random order.

    The order depends only on the seed and the epoch. The group with the longest row comes first, so that a training
    that runs out of memory does so at once. The other full groups are shuffled.

    Attributes:
        lengths: The length of each row.
        size: The number of rows in a group: the rows of one optimizer step.
        seed: The random seed.
        epoch: The number of the epoch, from 0; accelerate sets it.
    """

    def __init__(self, lengths: Sequence[int], size: int, seed: int) -> None:
        self.lengths, self.size, self.seed, self.epoch = lengths, size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Use the order of this epoch from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draws = torch.Generator().manual_seed(self.seed + self.epoch)
        rows = torch.randperm(len(self.lengths), generator=draws).tolist()
        groups, among = [], self.size * _AMONG
        for start in range(0, len(rows), among):
            ordered = sorted(rows[start : start + among], key=self.lengths.__getitem__, reverse=True)
            groups += [ordered[place : place + self.size] for place in range(0, len(ordered), self.size)]
        whole = [group for group in groups if len(group) == self.size]
        order = [whole[number] for number in torch.randperm(len(whole), generator=draws).tolist()]
        if order:
            longest = max(range(len(order)), key=lambda number: self.lengths[order[number][0]])
            order[0], order[longest] = order[longest], order[0]
        # Only the last group may have fewer rows. Elsewhere it would move the borders of all batches after it.
        order += groups[len(whole) :]
        yield from (row for group in order for row in group)


def padding(lengths: Sequence[int], rows: Sequence[int], size: int) -> float:
    """Return the computed tokens, padding included, per real token, for batches of ``size`` consecutive ``rows``."""
    batches = [[lengths[row] for row in rows[start : start + size]] for start in range(0, len(rows), size)]
    return sum(max(batch) * len(batch) for batch in batches) / max(1, sum(lengths))


def lengths_in(dataset: Any) -> list[int] | None:
    """Return the tokens of each row, with the longer of two answers; None if unknown, packed or a stream."""
    if isinstance(dataset, list):
        tokens = [row.get("input_ids") if isinstance(row, Mapping) else None for row in dataset]
        return None if any(ids is None for ids in tokens) else [len(ids) for ids in tokens if ids is not None]
    names = {*(getattr(dataset, "column_names", None) or ())}
    if "seq_lengths" in names or not hasattr(dataset, "__len__"):
        return None  # packed rows are equally long, and those of a stream have no order
    if names >= {"prompt_ids", "chosen_ids", "rejected_ids"}:
        columns = (dataset[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        return [len(prompt) + max(len(one), len(other)) for prompt, one, other in zip(*columns, strict=True)]
    return [len(ids) for ids in dataset["input_ids"]] if "input_ids" in names else None
