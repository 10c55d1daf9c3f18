"""The quality benchmark's scores, compared with those of all rows at once."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.quality.batches import IGNORED
from benchmarks.quality.evaluation import evaluate


class Tagger(nn.Module):
    """Given logits (rows, tokens, classes), returned as by models of transformers; in training mode all are 0."""

    def forward(self, logits: Tensor, labels: Tensor) -> Any:
        shown = 0 * logits if self.training else logits
        return SimpleNamespace(logits=shown, loss=functional.cross_entropy(shown.flatten(0, 1), labels.flatten()))


class Tags:
    """A hundred rows of five tokens, of which one to five have labels."""

    lengths = tuple(row % 5 + 1 for row in range(100))
    logits = torch.randn(100, 5, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(5) < torch.tensor(lengths)[:, None], torch.arange(100)[:, None] % 3, IGNORED)

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        return {"logits": self.logits[list(rows)], "labels": self.labels[list(rows)]}


def test_a_score_does_not_depend_on_the_batches() -> None:
    """Each label counts once, whatever the batch sizes; ignored labels don't. The model ends in eval mode."""
    model = Tagger().train()
    score = evaluate(model, Tags())
    known = Tags.labels != IGNORED
    logits, labels = Tags.logits[known], Tags.labels[known]
    assert score.accuracy == int((logits.argmax(-1) == labels).sum()) / len(labels)
    assert score.loss == pytest.approx(functional.cross_entropy(logits, labels).item())
    assert not model.training
