"""Checks that files of an earlier version still load: an adapter and the state of its training.

The folder holds ``adapter.safetensors`` and ``state.safetensors``, saved after `STEPS` steps of SGD on
`small.counted_net`, and ``expected.json``: the outputs and ranks at that moment, the history up to it, and the outputs
and ranks after as many steps again.
"""

import json
from pathlib import Path
from typing import Any

import torch

import tunerkit
from tunerkit_testing.small import counted_inputs, counted_loss, counted_net, step, trainable

STEPS = 6


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
