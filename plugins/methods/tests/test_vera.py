"""VeRA's matrices are PEFT's for the same key, saved or drawn again."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import tunerkit


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8))


def test_the_matrices_are_those_of_peft() -> None:
    """For one key, both matrices have PEFT's numbers to the last bit, whatever the seed of wrap is."""
    names = {"targets": ["0", "2"], "rank": 6, "key": 5}
    shared = tunerkit.tuner(tunerkit.wrap(net(), "vera", names, seed=3)).adapters()["0"].shared
    config = peft.VeraConfig(r=6, projection_prng_key=5, target_modules=["0", "2"])
    theirs: Any = peft.get_peft_model(net(), config).base_model
    assert torch.equal(shared.get_buffer("q"), theirs.vera_A["default"])
    assert torch.equal(shared.get_buffer("p"), theirs.vera_B["default"])


@pytest.mark.parametrize("saved", [True, False])
def test_a_file_without_the_matrices_loads(tmp_path: Path, saved: bool) -> None:
    """A file without them is smaller by just them, and gives the same output."""
    model = tunerkit.wrap(net(), "vera", {"targets": ["0", "2"], "rank": 6, "save_projection": saved})
    with torch.no_grad():
        for parameter in tunerkit.tuner(model).parameters():
            parameter.normal_()
    path = tunerkit.save(model, tmp_path)
    x = torch.randn(3, 12)
    assert torch.equal(tunerkit.load(net(), path)(x), model(x))
    names = "".join(name for name in model.state_dict() if name.endswith((".q", ".p")))
    assert bool(names) == saved
