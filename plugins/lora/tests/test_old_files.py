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
    """Same output, ranks and step count as when it was saved."""
    model = tunerkit.load(counted_net(), FIXTURES / "adapter.safetensors")
    torch.testing.assert_close(model(counted_inputs()), torch.tensor(EXPECTED["output"]), rtol=1e-5, atol=1e-6)
    assert tunerkit.tuner(model).ranks() == {"0": 3, "2": 2}
    assert tunerkit.tuner(model).loaded


def test_an_old_training_state_resumes() -> None:
    """The state goes into an attached adapter, which trains on from the step at which it was saved."""
    model = tunerkit.load(counted_net(), FIXTURES / "adapter.safetensors", trainable=True)
    optimizer = torch.optim.SGD(trainable(model), lr=0.05)
    tunerkit.attach(model, optimizer, total_steps=2 * STEPS)
    tunerkit.load_state(model, FIXTURES / "state.safetensors")
    assert tunerkit.tuner(model).steps == STEPS
    for _ in range(STEPS):
        step(model, optimizer, counted_loss)
    torch.testing.assert_close(model(counted_inputs()), torch.tensor(EXPECTED["resumed"]), rtol=1e-4, atol=1e-5)
