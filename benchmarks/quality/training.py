"""A plain training loop, on the CPU in fp32 on every machine."""

import math
import random
from collections.abc import Callable, Iterator

import attrs
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.quality.batches import Rows, shuffled_batches

_WARMUP = 0.06  # the share of steps in which the learning rate rises linearly
_MAX_GRAD_NORM = 1.0


@attrs.frozen
class Recipe:
    """Epochs, peak learning rate, batch size, and the seed of order and dropout."""

    epochs: int
    learning_rate: float
    batch_size: int
    seed: int

    def total_steps(self, rows: int) -> int:
        """Optimizer steps for ``rows`` training rows."""
        return self.epochs * math.ceil(rows / self.batch_size)


def rate_at(step: int, total: int) -> float:
    """The learning rate's factor at ``step`` (from 0) of ``total``: linear warmup, then linear decay to 0."""
    rise = max(1, round(_WARMUP * total))
    return min((step + 1) / rise, (total - step) / max(1, total - rise))


def train(
    model: nn.Module,
    rows: Rows,
    recipe: Recipe,
    optimizer: Optimizer,
    *,
    connect: Callable[[nn.Module, Optimizer, int], None],
    dropout: bool = True,
) -> Iterator[float]:
    """Train the parameters of ``optimizer``, and yield the loss of each step after it.

    ``connect`` is called before the first step with the model, the optimizer and the number of steps. Without
    ``dropout`` the model is in eval mode throughout.
    """
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    lengths = rows.lengths
    total = recipe.total_steps(len(lengths))
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    scheduler = LambdaLR(optimizer, lambda step: rate_at(step, total))
    connect(model, optimizer, total)
    model.train(dropout)
    for _ in range(recipe.epochs):
        for batch in shuffled_batches(lengths, recipe.batch_size, rng):
            loss = model(**rows.batch(batch)).loss
            loss.backward()
            nn.utils.clip_grad_norm_(trained, _MAX_GRAD_NORM)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            yield loss.item()
