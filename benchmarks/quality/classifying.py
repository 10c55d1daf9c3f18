"""Sentence classifiers and their rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from benchmarks.quality import minilm
from benchmarks.quality.batches import padded
from benchmarks.quality.sources import Examples


@attrs.frozen(eq=False)
class SentenceRows:
    """Encoded sentences with a class for each, and the padding token."""

    ids: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...]
    padding: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sentence."""
        return [len(ids) for ids in self.ids]

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` (rows, longest), and ``labels`` (rows,)."""
        labels = torch.tensor([self.labels[row] for row in rows])
        return {**padded([self.ids[row] for row in rows], self.padding), "labels": labels}


def load_classifier(
    parts: Sequence[Examples], cache: Path, *, seed: int, max_length: int
) -> tuple[nn.Module, list[SentenceRows]]:
    """A model for the labels of the first part, and every part encoded, truncated to ``max_length`` tokens."""
    classes = sorted(set(parts[0].labels))
    model, tokenizer = minilm.load(AutoModelForSequenceClassification, cache, classes=len(classes), seed=seed)
    numbers = {label: number for number, label in enumerate(classes)}
    return model, [_encode(tokenizer, part, numbers, max_length) for part in parts]


def _encode(tokenizer: Any, rows: Examples, numbers: dict[str, int], max_length: int) -> SentenceRows:
    encoded = tokenizer(list(rows.texts), truncation=True, max_length=max_length)["input_ids"]
    labels = tuple(numbers[label] for label in rows.labels)
    return SentenceRows(tuple(map(tuple, encoded)), labels, padding=tokenizer.pad_token_id)
