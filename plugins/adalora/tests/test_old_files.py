"""Files that were written before the core was cut into packages (at commit 9d060d1) still load."""

import json
from pathlib import Path

import torch

import tunerkit
from tunerkit.testing.small import counted_inputs, counted_loss, counted_net, step, trainable

FIXTURES = Path(__file__).parent / "fixtures"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text(encoding="utf-8"))
STEPS = 6


def test_an_old_adapter_loads() -> None:
    """Same output and ranks as when it was saved, in the middle of pruning."""
    model = tunerkit.load(counted_net(), FIXTURES / "adapter.safetensors")
    torch.testing.assert_close(model(counted_inputs()), torch.tensor(EXPECTED["output"]), rtol=1e-5, atol=1e-6)
    assert tunerkit.tuner(model).ranks() == dict(zip(("0", "2"), EXPECTED["ranks"], strict=True))
    assert tunerkit.tuner(model).loaded


def test_an_old_training_state_resumes() -> None:
    """Averages, masks, schedule and history come back, and training ends where the whole run ended."""
    model = tunerkit.load(counted_net(), FIXTURES / "adapter.safetensors", trainable=True)
    optimizer = torch.optim.SGD(trainable(model), lr=0.05)
    tunerkit.attach(model, optimizer, total_steps=2 * STEPS)
    tunerkit.load_state(model, FIXTURES / "state.safetensors")
    tuner = tunerkit.tuner(model)
    assert tuner.steps == STEPS
    assert [[change.step, change.budget, *change.ranks.values()] for change in tuner.history] == EXPECTED["history"]
    for _ in range(STEPS):
        step(model, optimizer, counted_loss)
    assert list(tuner.ranks().values()) == EXPECTED["resumed_ranks"]
    torch.testing.assert_close(model(counted_inputs()), torch.tensor(EXPECTED["resumed"]), rtol=1e-4, atol=1e-5)
