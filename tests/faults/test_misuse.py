"""Calls in the wrong state or with the wrong things raise our error, and the model is what it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tunerkit
from tests.support.toys import Toys

METHOD = "toy-low-rank"


def sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def inside_disabled(call: Callable[[Any, Path], object]) -> Callable[[Any, Path], None]:
    def inside(model: Any, file: Path) -> None:
        with tunerkit.disabled(model):
            call(model, file)

    return inside


Calls = dict[str, Callable[[Any, Path], object]]
ON_A_BASE: Calls = {
    "wrap with a method that is no text": lambda m, f: tunerkit.wrap(m, 3),  # type: ignore[arg-type]
    "wrap without targets": lambda m, f: tunerkit.wrap(m, METHOD, {"targets": []}),
    "wrap with a seed that is text": lambda m, f: tunerkit.wrap(m, METHOD, seed="0"),  # type: ignore[arg-type]
    "wrap with a seed of 100 digits": lambda m, f: tunerkit.wrap(m, METHOD, seed=10**100),
    "load from nowhere": lambda m, f: tunerkit.load(m, f / "nowhere"),
    "save": lambda m, f: tunerkit.save(m, f.parent / "new"),
    "merge": lambda m, f: tunerkit.merge(m),
    "unwrap": lambda m, f: tunerkit.unwrap(m),
    "disable": lambda m, f: tunerkit.disabled(m).__enter__(),
    "tuner": lambda m, f: tunerkit.tuner(m),
    "attach": lambda m, f: tunerkit.attach(m, torch.optim.SGD(m.parameters(), lr=0.1), total_steps=12),
    "structure a list": lambda m, f: tunerkit.structure(METHOD, ["rank", 2]),  # type: ignore[arg-type]
    "unregister what is not registered": lambda m, f: tunerkit.unregister(object()),
}
ON_A_WRAPPED: Calls = {
    "wrap with a name in use": lambda m, f: tunerkit.wrap(m, METHOD),
    "load with a name in use": lambda m, f: tunerkit.load(m, f),
    "load a state from an adapter's file": lambda m, f: tunerkit.load_state(m, f),
    "save an unknown adapter": lambda m, f: tunerkit.save(m, f.parent / "new", adapter="other"),
    "unmerge": lambda m, f: tunerkit.unmerge(m),
    "rename to a path": lambda m, f: tunerkit.rename(m, "default", "../up"),
    "attach with steps that are text": lambda m, f: tunerkit.attach(m, sgd(m), total_steps="12"),  # type: ignore[arg-type]
    "attach with negative steps": lambda m, f: tunerkit.attach(m, sgd(m), total_steps=-1),
    "disabled, wrap": inside_disabled(lambda m, f: tunerkit.wrap(m, METHOD, adapter="second")),
    "disabled, merge": inside_disabled(lambda m, f: tunerkit.merge(m)),
    "disabled, unwrap": inside_disabled(lambda m, f: tunerkit.unwrap(m)),
}
ON_A_MERGED: Calls = {
    "wrap": lambda m, f: tunerkit.wrap(m, METHOD, adapter="second"),
    "load": lambda m, f: tunerkit.load(m, f, adapter="second"),
    "merge": lambda m, f: tunerkit.merge(m),
    "activate": lambda m, f: tunerkit.activate(m, []),
    "delete": lambda m, f: tunerkit.delete(m, "default"),
}
STATES = {"base": ON_A_BASE, "wrapped": ON_A_WRAPPED, "merged": ON_A_MERGED}


@pytest.mark.parametrize(("state", "call"), [(state, call) for state, calls in STATES.items() for call in calls])
def test_a_wrong_call_is_an_error_and_changes_nothing(toys: "Toys", saved: Path, state: str, call: str) -> None:
    """The error is ours and has a text; every tensor is bit for bit what it was."""
    model = toys.net() if state == "base" else toys.trained()
    if state == "merged":
        tunerkit.merge(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(tunerkit.TunerkitError, match=r"\w"):
        STATES[state][call](model, saved)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
