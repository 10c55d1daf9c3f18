"""Batches of rows of similar length."""

import random
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

IGNORED = -100  # the label of positions without a prediction, as in torch and transformers
# Batches are cut from sorted pools of this many batches: little padding, but a different mixture in every epoch.
POOL = 32


class Rows(Protocol):
    """The rows that a model is trained and evaluated on."""

    @property
    def lengths(self) -> Sequence[int]:
        """The length of each row; batches group rows of similar length."""

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The model's inputs for these rows, with ``labels`` (`IGNORED` where nothing is predicted)."""


def padded(ids: Sequence[Sequence[int]], padding: int) -> dict[str, Tensor]:
    """``input_ids``, padded with the token ``padding``, and ``attention_mask``, both (rows, longest)."""
    longest = max(map(len, ids))
    filled = torch.full((len(ids), longest), padding)
    mask = torch.zeros(len(ids), longest, dtype=torch.long)
    for row, each in enumerate(ids):
        filled[row, : len(each)] = torch.tensor(each)
        mask[row, : len(each)] = 1
    return {"input_ids": filled, "attention_mask": mask}


def shuffled_batches(lengths: Sequence[int], size: int, rng: random.Random) -> Iterator[list[int]]:
    """Every row once, in batches of ``size`` (the last of a pool may be smaller), in random order."""
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches = []
    for start in range(0, len(order), size * POOL):
        pool = sorted(order[start : start + size * POOL], key=lengths.__getitem__)
        batches += [pool[first : first + size] for first in range(0, len(pool), size)]
    rng.shuffle(batches)
    yield from batches


def sorted_batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Every row once, shortest first, which needs the least padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    yield from (order[start : start + size] for start in range(0, len(order), size))
