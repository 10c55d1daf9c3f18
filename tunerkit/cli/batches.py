"""Encoded sentences, in batches of similar length."""

import random
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor

from tunerkit.cli.data import Examples, class_numbers
from tunerkit.cli.models import Classifier

# Batches are cut from sorted pools of this many batches: little padding, and different batches in every epoch.
POOL = 32


class Rows(Protocol):
    """The rows that a model is trained or evaluated on."""

    @property
    def lengths(self) -> Sequence[int]:
        """The length of each row; batches group rows of similar length."""

    def batch(self, rows: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """The model's inputs for these rows, including ``labels``."""


@attrs.frozen(eq=False)
class Encoded:
    """Token ids and class numbers of each row, and the padding token.

    A subclass may have other labels: only `label_tensor` reads them.
    """

    ids: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...]
    padding: int

    @property
    def lengths(self) -> list[int]:
        """The number of tokens in each row."""
        return [len(ids) for ids in self.ids]

    def batch(self, rows: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, both (rows, longest), and the ``labels``."""
        longest = max(len(self.ids[row]) for row in rows)
        ids = torch.full((len(rows), longest), self.padding)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for place, row in enumerate(rows):
            length = len(self.ids[row])
            ids[place, :length] = torch.tensor(self.ids[row])
            mask[place, :length] = 1
        labels = self.label_tensor(rows, longest)
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}

    def label_tensor(self, rows: Sequence[int], longest: int) -> Tensor:
        """The class numbers of ``rows``, (rows,). The longest row has ``longest`` tokens."""
        return torch.tensor([self.labels[row] for row in rows])


def encode(classifier: Classifier, examples: Examples, *, max_length: int) -> Encoded:
    """Tokenize, truncate to ``max_length`` tokens or the model's limit, and number the classes."""
    tokenizer, config = classifier.tokenizer, classifier.model.config
    positions: Any = getattr(config, "max_position_embeddings", None)  # models with relative positions have no limit
    limit = min(max_length, tokenizer.model_max_length, positions or max_length)
    encoded = tokenizer(list(examples.texts), truncation=True, max_length=limit)["input_ids"]
    labels = class_numbers(examples.labels, classifier.classes)
    return Encoded(tuple(map(tuple, encoded)), tuple(labels), padding=tokenizer.pad_token_id)


def shuffled_batches(lengths: Sequence[int], size: int, rng: random.Random) -> Iterator[list[int]]:
    """Yield every row once, in batches of ``size`` in random order. The last batch of a pool may be smaller."""
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches = []
    for start in range(0, len(order), size * POOL):
        pool = sorted(order[start : start + size * POOL], key=lengths.__getitem__)
        batches += [pool[first : first + size] for first in range(0, len(pool), size)]
    rng.shuffle(batches)
    yield from batches


def sorted_batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield every row once, shortest first, which needs the least padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    yield from (order[start : start + size] for start in range(0, len(order), size))
