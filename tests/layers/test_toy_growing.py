"""A method that grows its rank while it trains: schedule, memory, files and resuming."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tunerkit
from tests.support.resumed_loop import assert_resumes
from tests.support.toy_growing import GrowingPlugin
from tests.support.toys import registering
from tunerkit_testing.small import net, train, trainable

CONFIG: dict[str, Any] = {"targets": ["0", "2"], "every": 2, "max_rank": 3}


_toys = registering(GrowingPlugin())


def attached(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(trainable(model), lr=0.05)
    tunerkit.attach(model, optimizer, total_steps=8)
    return optimizer


def test_ranks_grow_on_the_schedule_and_are_recorded() -> None:
    """Each adapter starts at rank 1 and gets one more at steps 2 and 4; the loss falls, and parameters stay objects."""
    model = tunerkit.wrap(net(), "toy-growing", CONFIG, seed=0)
    before = {id(parameter) for parameter in trainable(model)}
    losses = train(model, attached(model), 8)
    tuner = tunerkit.tuner(model)
    assert [(change.step, change.ranks) for change in tuner.history] == [
        (2, {"0": 2, "2": 2}),
        (4, {"0": 3, "2": 3}),
    ]
    assert tuner.budget() == 6
    assert {id(parameter) for parameter in trainable(model)} == before
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("stopped", [1, 2, 3, 5])
def test_a_resumed_loop_ends_bit_for_bit_as_without_the_stop(stopped: int, tmp_path: Path) -> None:
    """The file has the rank of that moment, the optimizer's state fits it, and the schedule goes on."""
    assert_resumes(
        lambda: tunerkit.wrap(net(), "toy-growing", CONFIG, seed=0), attached, tmp_path, steps=8, stopped=stopped
    )
