"""A plain training loop, on the CPU in the precision of its recipe on every machine."""

import math
import random
from collections.abc import Callable, Iterator

import attrs
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.quality.batches import Rows, shuffled_batches


@attrs.frozen
class Recipe:
    """How a run is trained.

    Attributes:
        epochs: Epochs.
        learning_rate: The peak learning rate.
        batch_size: Rows in a batch.
        seed: The seed of order and dropout.
        warmup: The share of steps in which the learning rate rises linearly.
        beta2: AdamW's second β.
        clip: The norm above which gradients are clipped.
        precision: ``"fp32"``, or ``"bf16"`` for autocast.
    """

    epochs: int
    learning_rate: float
    batch_size: int
    seed: int
    warmup: float = 0.06
    beta2: float = 0.999
    clip: float = 1.0
    precision: str = "fp32"

    def total_steps(self, rows: int) -> int:
        """Optimizer steps for ``rows`` training rows."""
        return self.epochs * math.ceil(rows / self.batch_size)


def rate_at(step: int, total: int, warmup: float = 0.06) -> float:
    """The learning rate's factor at ``step`` (from 0) of ``total``: linear warmup, then linear decay to 0."""
    rise = max(1, round(warmup * total))
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
    scheduler = LambdaLR(optimizer, lambda step: rate_at(step, total, recipe.warmup))
    connect(model, optimizer, total)
    model.train(dropout)
    for _ in range(recipe.epochs):
        for batch in shuffled_batches(lengths, recipe.batch_size, rng):
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
                loss = model(**rows.batch(batch)).loss
            loss.backward()
            nn.utils.clip_grad_norm_(trained, recipe.clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            yield loss.item()
