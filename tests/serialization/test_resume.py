"""The training state in an optimizer's state_dict; its file is tested in test_training_state.py."""

import io
from typing import Any

import pytest
import torch

import tunerkit
from tests.support.model_checks import fit, silent
from tests.support.toys import Toys

TOTAL = 9


def attached(toys: "Toys", *names: str, method: str = "toy-stepper", total: int = TOTAL) -> tuple[Any, Any]:
    model: Any = toys.net()
    for name in names or ("default",):
        tunerkit.wrap(model, method, {"targets": ["conv"]}, adapter=name)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tunerkit.attach(model, optimizer, total_steps=total)
    return model, optimizer


def stored(optimizer: Any) -> dict[str, Any]:
    """The optimizer's state_dict after a round trip through a file, loaded with weights_only."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    found: dict[str, Any] = torch.load(file, weights_only=True)
    return found


def test_loading_the_optimizer_s_state_brings_back_the_training_state(toys: "Toys") -> None:
    """Each adapter gets its own state by name, and steps continue from there."""
    model, optimizer = attached(toys, "a", "b")
    fit(model, optimizer, toys.x(), 2)
    tunerkit.activate(model, ["a"])
    fit(model, optimizer, toys.x(), 1)
    again, other = attached(toys, "a", "b")
    other.load_state_dict(stored(optimizer))
    assert [tunerkit.tuner(again, name).steps for name in "ab"] == [3, 2]
    assert tunerkit.tuner(again, "a").state == (torch.tensor([3]), 3)


def test_a_method_that_needs_no_steps_leaves_the_optimizer_s_state_as_torch_has_it(toys: "Toys") -> None:
    """If there is no state to lose, nothing is added, and nothing after the adapter is detached."""
    _, optimizer = attached(toys, method="toy-shift")
    assert set(optimizer.state_dict()) == {"state", "param_groups"}
    model, optimizer = attached(toys)
    assert set(optimizer.state_dict()) == {"state", "param_groups", "tunerkit"}
    tunerkit.delete(model, "default")
    assert set(optimizer.state_dict()) == {"state", "param_groups"}


def test_another_run_s_state_is_refused_before_the_optimizer_s_is_touched(toys: "Toys") -> None:
    """The error names the differences, as for a file."""
    model, optimizer = attached(toys)
    fit(model, optimizer, toys.x(), 2)
    _, longer = attached(toys, total=TOTAL + 1)
    with pytest.raises(tunerkit.errors.FileError, match=r"state_dict belongs to another run.*\n- total_steps 9 -> 10"):
        longer.load_state_dict(stored(optimizer))
    assert not longer.state


@pytest.mark.parametrize("lost", ["tensors", "metadata", "both"])
def test_a_damaged_training_state_is_named(toys: "Toys", lost: str) -> None:
    """The error says where it is, and nothing was resumed."""
    model, optimizer = attached(toys)
    fit(model, optimizer, toys.x(), 2)
    state = stored(optimizer)
    state["tunerkit"]["default"] = (
        [] if lost == "both" else {key: value for key, value in state["tunerkit"]["default"].items() if key != lost}
    )
    again, other = attached(toys)
    with pytest.raises(tunerkit.errors.FileError, match="the optimizer's state_dict has a damaged training state"):
        other.load_state_dict(state)
    assert tunerkit.tuner(again).steps == 0


def test_a_state_taken_without_the_adapter_attached_triggers_a_warning(toys: "Toys") -> None:
    """Otherwise the schedule would silently restart in the middle of training; an empty state triggers none."""
    model, optimizer = attached(toys)
    fit(model, optimizer, toys.x(), 2)
    plain = {key: value for key, value in stored(optimizer).items() if key != "tunerkit"}
    _, again = attached(toys)
    with pytest.warns(tunerkit.TunerkitWarning, match="restarts at step 0.*load_state"):
        again.load_state_dict(plain)
    _, fresh = attached(toys)
    with silent():
        fresh.load_state_dict({**plain, "state": {}})
