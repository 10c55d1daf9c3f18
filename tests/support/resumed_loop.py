"""A plain training loop that stops and is resumed from files, beside one that does not stop."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

import tunerkit
from tunerkit_testing.small import X, net, train


def assert_resumes(
    wrapped: Callable[[], nn.Module],
    started: Callable[[nn.Module], Optimizer],
    folder: Path,
    *,
    steps: int,
    stopped: int,
) -> None:
    """Assert that a training on `small.net` ends bit for bit as without the stop, in weights, outputs and ranks."""
    whole, model = wrapped(), wrapped()
    train(whole, started(whole), steps)
    optimizer = started(model)
    train(model, optimizer, stopped)
    tunerkit.save(model, folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    resumed = tunerkit.load(net(), folder, trainable=True)
    again = started(resumed)
    again.load_state_dict(torch.load(folder / "optimizer.pt"))
    train(resumed, again, steps - stopped)
    assert tunerkit.tuner(resumed).ranks() == tunerkit.tuner(whole).ranks()
    assert torch.equal(resumed(X), whole(X))
    assert all(torch.equal(*pair) for pair in zip(resumed.parameters(), whole.parameters(), strict=True))
