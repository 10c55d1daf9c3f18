"""Restoring a training state is all or nothing, whatever a method's plugin does before it raises."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tunerkit
from tests.support.adapter_files import rewritten
from tests.support.model_checks import attached, fit
from tests.support.toys import FULL, OneMethod, Toys
from tunerkit.errors import BaseMismatchError, FileError
from tunerkit.plugin import Method, State, Tuner
from tunerkit.serialization.training_state import restore_
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_adapters import Shift
from tunerkit_testing.toy_methods import ShiftConfig, Shifting


class CarelessPlugin(OneMethod, Shifting):
    """``toy-careless``: restoring writes into the adapters and into the state, and then finds out what is missing."""

    method = Method("toy-careless", config=ShiftConfig)

    @tunerkit.hookimpl
    def tunerkit_start(self, tuner: Tuner) -> dict[str, Any]:
        return {"average": torch.ones(3), "adapters": list(tuner.adapters().values())}

    @tunerkit.hookimpl
    def tunerkit_state(self, tuner: Tuner) -> State:
        return State(tensors={"average": torch.full((3,), 5.0)}, values={})

    @tunerkit.hookimpl
    def tunerkit_restore(self, tuner: Tuner, state: State) -> None:
        live: Any = tuner.state
        live["average"].copy_(state.tensors["average"])
        for adapter in tuner.adapters().values():
            assert isinstance(adapter, Shift)
            adapter.v.data.fill_(9.0)
        tuner.state = {**live, "mask": state.tensors["mask"]}


def test_a_state_that_cannot_be_restored_changes_nothing(toys: "Toys", tmp_path: Path) -> None:
    """Weights, the method's state, steps and history are as before, and training goes on with the same objects."""
    with registered(CarelessPlugin()):
        model = toys.trained("toy-careless", targets=["conv", "layers.0"])
        tuner = tunerkit.tuner(model)
        optimizer = attached(model)
        path = tunerkit.save_state(model, tmp_path)
        fit(model, optimizer, toys.x(), 2)
        weights = [parameter.detach().clone() for parameter in tuner.parameters()]
        objects = [id(parameter) for parameter in tuner.parameters()]
        history = list(tuner.history)
        with pytest.raises(KeyError, match="mask") as caught:
            tunerkit.load_state(model, path)
        assert any(f"while restoring {path}. Load a state" in note for note in caught.value.__notes__)
        assert all(torch.equal(a, b) for a, b in zip(weights, tuner.parameters(), strict=True))
        assert [id(parameter) for parameter in tuner.parameters()] == objects
        assert (tuner.steps, tuner.history) == (2, history)
        state: Any = tuner.state
        assert state.keys() == {"average", "adapters"}
        assert torch.equal(state["average"], torch.ones(3))
        assert all(a is b for a, b in zip(state["adapters"], tuner.adapters().values(), strict=True))


def test_weights_that_cannot_be_restored_change_nothing(toys: "Toys", tmp_path: Path) -> None:
    """The misfit is in the last module, after others have been filled."""
    path = tunerkit.save(toys.fill_(toys.trained(), seed=5), tmp_path)

    def remove(fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        del tensors["layers.1.adapter.a"]

    model = toys.trained()
    tuner = tunerkit.tuner(model)
    before = {parameter: parameter.detach().clone() for parameter in tuner.parameters()}
    with pytest.raises(FileError, match=r"missing: layers\.1\.adapter\.a"):
        restore_(tuner, rewritten(path, tmp_path / "x.safetensors", remove))
    assert all(torch.equal(before[parameter], parameter) for parameter in tuner.parameters())
    restore_(tuner, path)
    assert any(not torch.equal(before[parameter], parameter) for parameter in tuner.parameters())


def test_weights_from_another_base_are_not_restored(toys: "Toys", tmp_path: Path) -> None:
    """A training is resumed on the base that it started on. On another one the live adapter keeps its weights."""
    path = tunerkit.save(toys.fill_(toys.trained(), seed=5), tmp_path)
    other = toys.net()
    with torch.no_grad():
        other.conv.weight.mul_(1.02)
    model = toys.fill_(tunerkit.wrap(other, "toy-low-rank", dict(FULL), seed=3))
    before = toys.snapshot(model)
    with pytest.raises(BaseMismatchError, match=r"other values: conv\.weight"):
        restore_(tunerkit.tuner(model), path)
    assert toys.same(toys.snapshot(model), before)
