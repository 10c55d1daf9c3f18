"""Accuracy and loss on held-out rows, on the CPU in fp32 on every machine."""

import attrs
import torch
from torch import nn

from benchmarks.quality.batches import IGNORED, Rows, sorted_batches

_BATCH_SIZE = 64


@attrs.frozen
class Score:
    """The share of labels predicted correctly, and the mean loss per label; `IGNORED` labels don't count."""

    accuracy: float
    loss: float


@torch.inference_mode()
def evaluate(model: nn.Module, rows: Rows) -> Score:
    """Score ``model``, which is left in eval mode."""
    model.eval()
    right, labels, loss = 0, 0, 0.0
    for batch in sorted_batches(rows.lengths, _BATCH_SIZE):
        inputs = rows.batch(batch)
        out = model(**inputs)
        right += int((out.logits.argmax(-1) == inputs["labels"]).sum())
        known = int((inputs["labels"] != IGNORED).sum())
        loss += out.loss.item() * known
        labels += known
    return Score(accuracy=right / labels, loss=loss / labels)


def majority(rows: Rows) -> float:
    """The share of the most frequent label: the accuracy of a model that predicts nothing else."""
    every = torch.cat([rows.batch(batch)["labels"].flatten() for batch in sorted_batches(rows.lengths, _BATCH_SIZE)])
    counts = every[every != IGNORED].bincount()
    return float(counts.max() / counts.sum())
