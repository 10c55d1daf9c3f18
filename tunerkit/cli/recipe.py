"""The hyperparameters of a training run, apart from the method's own settings."""

import math

import attrs


@attrs.frozen
class Recipe:
    """Hyperparameters. ``warmup`` is the share of steps in which the learning rate rises; then it decays to 0."""

    epochs: int = 3
    learning_rate: float = 1e-3
    batch_size: int = 32
    seed: int = 0
    warmup: float = 0.06
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def total_steps(self, rows: int) -> int:
        """The number of optimizer steps for ``rows`` training rows."""
        return self.epochs * math.ceil(rows / self.batch_size)

    def rate_at(self, step: int, total: int) -> float:
        """The learning rate's factor at ``step`` (from 0): linear warm-up, then linear decay."""
        rise = max(1, round(self.warmup * total))
        return min((step + 1) / rise, (total - step) / max(1, total - rise))
