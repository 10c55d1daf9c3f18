"""Optimizers that keep copies of the weights: they would pull P, Λ and Q back after a re-parametrisation."""

from collections.abc import Iterable

from torch import Tensor
from torch.optim import Optimizer

# What optimizers call a second copy of the weights in their state: ASGD, schedule-free ones, Prodigy, D-Adaptation,
# Ranger, timm's Lookahead, and those with weights in full precision.
_COPIES = frozenset(
    {"ax", "z", "p0", "x0", "slow_buffer", "lookahead_params", "lookahead_slow_buff", "master_param", "master_weights"}
)


def copies_in(optimizer: Optimizer | None, weights: Iterable[Tensor]) -> list[str]:
    """Look for copies of the weights in an optimizer's state.

    Args:
        optimizer: The optimizer, or None if it is gone.
        weights: The weights.

    Returns:
        The names of the copies in the state, sorted.
    """
    if optimizer is None:
        return []
    kept = (optimizer.state[weight] for weight in weights if weight in optimizer.state)
    return sorted({str(name) for state in kept for name in state if name in _COPIES})
