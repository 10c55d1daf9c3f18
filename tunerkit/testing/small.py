"""A small model with data and a plain loop to train it by: what a method's own tests begin with."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(0, 3, (8,), generator=torch.Generator().manual_seed(2))
# The linear layers of `net`, and their features out and in.
TARGETS = ("0", "2", "4")
SHAPES = ((8, 6), (7, 8), (3, 7))


def net() -> nn.Sequential:
    """The same three layers at each call: (N, 6) to (N, 3)."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer gets."""
    return [p for p in model.parameters() if p.requires_grad]


def loss_of(model: nn.Module, rows: slice = slice(None)) -> Tensor:
    """The share of ``rows`` in the mean cross-entropy over `X`."""
    return nn.functional.cross_entropy(model(X[rows]), LABELS[rows], reduction="sum") / len(X)


def step(model: nn.Module, optimizer: Optimizer, loss: Callable[[nn.Module], Tensor] = loss_of) -> float:
    """One step over all of `X`; the loss before it."""
    optimizer.zero_grad()
    value = loss(model)
    value.backward()
    optimizer.step()
    return float(value.detach())


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> list[float]:
    """So many steps; their losses."""
    return [step(model, optimizer) for _ in range(steps)]


def closure_of(model: nn.Module, optimizer: Optimizer) -> Callable[[], float]:
    """What ``optimizer.step`` may call, as often as it likes: new gradients over all of `X`, and the loss."""

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return float(loss.detach())

    return closure


def counted_net() -> nn.Sequential:
    """A model whose weights are counted out and not drawn, so that every release of torch builds the same one.

    The files in the plugins' fixtures were trained on it: (N, 6) to (N, 2).
    """
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Linear(4, 2))
    for number, parameter in enumerate(model.parameters(), 1):
        values = torch.arange(parameter.numel(), dtype=torch.float32).reshape(parameter.shape)
        parameter.data = torch.sin(values * 0.37 + number)
    return model


def counted_inputs() -> Tensor:
    """The batch that goes with `counted_net`, (5, 6)."""
    return torch.cos(torch.arange(30, dtype=torch.float32).reshape(5, 6) * 0.71)


def counted_loss(model: nn.Module) -> Tensor:
    """The squared distance of the outputs from 1."""
    loss: Tensor = (model(counted_inputs()) - 1).square().mean()
    return loss
