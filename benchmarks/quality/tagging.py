"""Models that label tokens, and their rows."""

from collections.abc import Sequence
from typing import Any

import attrs
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification, AutoTokenizer, set_seed

from benchmarks.quality.sources import Tagged
from tunerkit.cli.batches import Encoded
from tunerkit.cli.training import IGNORED


@attrs.frozen(eq=False)
class TokenRows(Encoded):
    """Encoded sentences with a class for each token, `IGNORED` where none is to be told."""

    token_labels: tuple[tuple[int, ...], ...] = ()

    def label_tensor(self, rows: Sequence[int], longest: int) -> Tensor:
        """Classes (rows, longest)."""
        labels = torch.full((len(rows), longest), IGNORED)
        for place, row in enumerate(rows):
            labels[place, : len(self.token_labels[row])] = torch.tensor(self.token_labels[row])
        return labels


def load_tagger(
    source: str, parts: Sequence[Tagged], *, seed: int, max_length: int
) -> tuple[nn.Module, list[TokenRows]]:
    """A model for the tags of the first part, and every part encoded; words with other tags are not told."""
    classes = sorted({tag for tags in parts[0].tags for tag in tags})
    tokenizer = AutoTokenizer.from_pretrained(source)
    transformers.logging.set_verbosity_error()  # a report on the new head
    set_seed(seed)
    model = AutoModelForTokenClassification.from_pretrained(source, num_labels=len(classes), dtype=torch.float32)
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
    return TokenRows(
        ids=tuple(map(tuple, encoded["input_ids"])),
        labels=(),
        padding=tokenizer.pad_token_id,
        token_labels=tuple(labels),
    )


def first_tokens(words: Sequence[int | None], labels: Sequence[int]) -> tuple[int, ...]:
    """The label of each token's word, at a word's first token alone."""
    before = [None, *words[:-1]]
    return tuple(
        IGNORED if word is None or word == last else labels[word] for word, last in zip(words, before, strict=True)
    )
