"""Token classifiers and their rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification

from benchmarks.quality import minilm
from benchmarks.quality.batches import IGNORED, padded
from benchmarks.quality.sources import Tagged


@attrs.frozen(eq=False)
class TokenRows:
    """Encoded sentences with a class for each token (`IGNORED` if it has none), and the padding token."""

    ids: tuple[tuple[int, ...], ...]
    labels: tuple[tuple[int, ...], ...]
    padding: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sentence."""
        return [len(ids) for ids in self.ids]

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels``, all (rows, longest)."""
        inputs = padded([self.ids[row] for row in rows], self.padding)
        labels = torch.full_like(inputs["input_ids"], IGNORED)
        for place, row in enumerate(rows):
            labels[place, : len(self.labels[row])] = torch.tensor(self.labels[row])
        return {**inputs, "labels": labels}


def load_tagger(
    parts: Sequence[Tagged], cache: Path, *, seed: int, max_length: int
) -> tuple[nn.Module, list[TokenRows]]:
    """A model for the tags of the first part, and every part encoded; words with other tags are ignored."""
    classes = sorted({tag for tags in parts[0].tags for tag in tags})
    model, tokenizer = minilm.load(AutoModelForTokenClassification, cache, classes=len(classes), seed=seed)
    numbers = {tag: number for number, tag in enumerate(classes)}
    return model, [_encode(tokenizer, part, numbers, max_length) for part in parts]


def _encode(tokenizer: Any, rows: Tagged, numbers: dict[str, int], max_length: int) -> TokenRows:
    encoded = tokenizer(
        [list(words) for words in rows.words], is_split_into_words=True, truncation=True, max_length=max_length
    )
    labels = [
        first_tokens(encoded.word_ids(row), [numbers.get(tag, IGNORED) for tag in tags])
        for row, tags in enumerate(rows.tags)
    ]
    return TokenRows(tuple(map(tuple, encoded["input_ids"])), tuple(labels), padding=tokenizer.pad_token_id)


def first_tokens(words: Sequence[int | None], labels: Sequence[int]) -> tuple[int, ...]:
    """The label of each word at its first token; `IGNORED` at all other tokens."""
    before = [None, *words[:-1]]
    return tuple(
        IGNORED if word is None or word == last else labels[word] for word, last in zip(words, before, strict=True)
    )
