"""A small model, its data and a plain training loop, for a method's own tests."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(0, 3, (8,), generator=torch.Generator().manual_seed(2))
# The paths of the linear layers of `net`, and their shapes (out, in).
TARGETS = ("0", "2", "4")
SHAPES = ((8, 6), (7, 8), (3, 7))


def net() -> nn.Sequential:
    """Build three linear layers with the same weights at each call: (N, 6) to (N, 3)."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters to pass to an optimizer.

    Args:
        model: Any model; its parameters that require a gradient are returned.
    """
    return [p for p in model.parameters() if p.requires_grad]


def loss_of(model: nn.Module, rows: slice = slice(None)) -> Tensor:
    """Return the contribution of some rows to the mean cross-entropy over `X`.

    The contributions of disjoint slices add up to the full loss, which tests of gradient accumulation use.

    Args:
        model: Maps (N, 6) to (N, 3).
        rows: Rows of `X`; by default all of them.

    Returns:
        A scalar.
    """
    x = X[rows].clone()  # an adapter that writes into its input must not change that of other tests
    return nn.functional.cross_entropy(model(x), LABELS[rows], reduction="sum") / len(X)


def step(model: nn.Module, optimizer: Optimizer, loss: Callable[[nn.Module], Tensor] = loss_of) -> float:
    """Take one optimizer step.

    Args:
        model: The model to train.
        optimizer: Steps the model's parameters.
        loss: Maps the model to a scalar; by default the loss over all of `X`.

    Returns:
        The loss before the step.
    """
    optimizer.zero_grad()
    value = loss(model)
    value.backward()
    optimizer.step()
    return float(value.detach())


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> list[float]:
    """Take several optimizer steps over all of `X`.

    Args:
        model: The model to train.
        optimizer: Steps the model's parameters.
        steps: The number of steps.

    Returns:
        The loss before each step.
    """
    return [step(model, optimizer) for _ in range(steps)]


def closure_of(model: nn.Module, optimizer: Optimizer) -> Callable[[], float]:
    """What ``optimizer.step`` may call, as often as it likes: new gradients over all of `X`, and the loss."""

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return float(loss.detach())

    return closure
