"""VB-LoRA: the length of its vectors."""

import json
from pathlib import Path

import peft
import torch
from torch import nn

import tunerkit


class Net(nn.Module):
    """Two linear layers of other sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.out = nn.Linear(24, 16), nn.Linear(16, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(torch.tanh(self.lin(x)))
        return out


def test_a_length_that_was_not_given_divides_all_sides_and_is_written_for_peft(tmp_path: Path) -> None:
    """The bank is shared, so there is one length: of 24, 16 and 32 it is 8, which PEFT's settings must say."""
    torch.manual_seed(0)
    base = Net()
    state, x = {name: each.clone() for name, each in base.state_dict().items()}, torch.randn(3, 24)
    model = tunerkit.wrap(base, "vblora", {"targets": ["lin", "out"], "vectors": 10, "start": "random"})
    with torch.no_grad():
        for parameter in tunerkit.tuner(model).parameters():
            parameter.add_(torch.randn_like(parameter))
    tunerkit.export(model, tmp_path / "folder", format="peft")
    assert json.loads((tmp_path / "folder/adapter_config.json").read_text())["vector_length"] == 8
    again = Net()
    again.load_state_dict(state)
    theirs = peft.PeftModel.from_pretrained(again, str(tmp_path / "folder"))
    assert torch.allclose(theirs(x), model(x), atol=1e-5)
