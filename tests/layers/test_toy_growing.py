"""A method that grows its rank while it trains: schedule, memory, files and resuming."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tunerkit
from tests.support.resumed_loop import assert_resumes
from tests.support.toy_growing import GrowingPlugin
from tunerkit_testing.registering import registered
from tunerkit_testing.small import X, net, step, train, trainable

CONFIG: dict[str, Any] = {"targets": ["0", "2"], "every": 2, "max_rank": 3}


@pytest.fixture(autouse=True, scope="module")
def _toys() -> Iterator[None]:
    with registered(GrowingPlugin()):
        yield


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


def test_growing_changes_no_output() -> None:
    """The new columns of b are 0."""
    model = tunerkit.wrap(net(), "toy-growing", {**CONFIG, "every": 1}, seed=0)
    optimizer = attached(model)
    step(model, optimizer)
    outputs = model(X)
    twin = tunerkit.wrap(net(), "toy-growing", {**CONFIG, "every": 5}, seed=0)
    step(twin, attached(twin))
    torch.testing.assert_close(outputs, twin(X), rtol=0, atol=1e-6)
    assert tunerkit.tuner(model).ranks() != tunerkit.tuner(twin).ranks()


@pytest.mark.parametrize("stopped", [1, 2, 3, 5])
def test_a_resumed_loop_ends_bit_for_bit_as_without_the_stop(stopped: int, tmp_path: Path) -> None:
    """The file has the rank of that moment, the optimizer's state fits it, and the schedule goes on."""
    assert_resumes(
        lambda: tunerkit.wrap(net(), "toy-growing", CONFIG, seed=0), attached, tmp_path, steps=8, stopped=stopped
    )


def test_where_it_cannot_grow_attaching_is_refused() -> None:
    """The method asks for obstacles before training, with the optimizer at hand, and says which one."""
    model = tunerkit.wrap(net(), "toy-growing", CONFIG, seed=0)
    optimizer = torch.optim.Adafactor(trainable(model))
    with pytest.raises(
        tunerkit.errors.StepError, match="cannot grow here: Adafactor is not known to update each element"
    ):
        tunerkit.attach(model, optimizer, total_steps=8)
    train(model, attached(model), 4)
    assert set(tunerkit.tuner(model).ranks().values()) == {3}
