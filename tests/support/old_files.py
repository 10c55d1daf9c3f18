"""Checks that files of an earlier version still load: an adapter and the state of its training.

The folder holds ``adapter.safetensors`` and ``state.safetensors``, saved after `STEPS` steps of SGD on
`counted_net`, and ``expected.json``: the outputs and ranks at that moment, the history up to it, and the outputs
and ranks after as many steps again.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tunerkit
from tunerkit_testing.small import step, trainable

STEPS = 6


def counted_net() -> nn.Sequential:
    """Build a model whose weights come from a formula, so that every release of torch builds the same one.

    It maps (N, 6) to (N, 2). The files in the plugins' fixtures were trained on it.
    """
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Linear(4, 2))
    for number, parameter in enumerate(model.parameters(), 1):
        values = torch.arange(parameter.numel(), dtype=torch.float32).reshape(parameter.shape)
        parameter.data = torch.sin(values * 0.37 + number)
    return model


def counted_inputs() -> Tensor:
    """Return the input batch for `counted_net`, (5, 6)."""
    return torch.cos(torch.arange(30, dtype=torch.float32).reshape(5, 6) * 0.71)


def counted_loss(model: nn.Module) -> Tensor:
    """Return the mean squared error to 1, a scalar.

    Args:
        model: Maps (5, 6) to any shape.
    """
    loss: Tensor = (model(counted_inputs()) - 1).square().mean()
    return loss


def check_adapter_loads(folder: Path) -> None:
    """The adapter has the outputs and ranks that it had when it was saved."""
    expected = _expected(folder)
    model = tunerkit.load(counted_net(), folder / "adapter.safetensors")
    torch.testing.assert_close(model(counted_inputs()), torch.tensor(expected["output"]), rtol=1e-5, atol=1e-6)
    assert tunerkit.tuner(model).ranks() == dict(zip(("0", "2"), expected["ranks"], strict=True))
    assert tunerkit.tuner(model).progress.loaded


def check_state_resumes(folder: Path) -> None:
    """Step and history come back, and training on ends where it ended for the earlier version."""
    expected = _expected(folder)
    model = tunerkit.load(counted_net(), folder / "adapter.safetensors", trainable=True)
    optimizer = torch.optim.SGD(trainable(model), lr=0.05)
    tunerkit.attach(model, optimizer, total_steps=2 * STEPS)
    tunerkit.load_state(model, folder / "state.safetensors")
    tuner = tunerkit.tuner(model)
    assert tuner.steps == STEPS
    assert [[change.step, change.budget, *change.ranks.values()] for change in tuner.history] == expected["history"]
    for _ in range(STEPS):
        step(model, optimizer, counted_loss)
    assert list(tuner.ranks().values()) == expected["resumed_ranks"]
    torch.testing.assert_close(model(counted_inputs()), torch.tensor(expected["resumed"]), rtol=1e-4, atol=1e-5)


def _expected(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    return found
