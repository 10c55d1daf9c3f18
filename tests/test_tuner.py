"""The handle on one adapter: found by name, ambiguous or not, and what it says without any step."""

from typing import TYPE_CHECKING, Any

import pytest
from torch import nn

import tunerkit
from tunerkit.adapter import Adapter
from tunerkit.errors import AdapterError
from tunerkit.tuner import tuners_of

if TYPE_CHECKING:
    from tests.conftest import Toys


def test_a_tuner_is_found_by_name_or_alone(toys: "Toys") -> None:
    """One adapter needs no name; of two, the name decides; an unknown name gets the closest."""
    model = tunerkit.wrap(toys.net(), "toy-low-rank", adapter="first")
    assert tunerkit.tuner(model) is tunerkit.tuner(model, "first")
    tunerkit.wrap(model, "toy-shift", adapter="second")
    with pytest.raises(AdapterError, match=r"several adapters: first, second; say which: adapter="):
        tunerkit.tuner(model)
    assert tunerkit.tuner(model, "second").method == "toy-shift"
    for wrong in ("frist", 3):
        with pytest.raises(AdapterError, match=r"no adapter named .*there are: first, second"):
            tunerkit.tuner(model, wrong)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="did you mean 'first'"):
        tunerkit.tuner(model, "frist")


def test_wrappers_around_the_model_are_seen_through(toys: "Toys") -> None:
    """DDP, value heads and others put the model into another: every call finds it there."""
    model = toys.trained()
    output = model(toys.x())
    outer = nn.Sequential(model, nn.Identity())
    assert tunerkit.tuner(outer) is tunerkit.tuner(model)
    with tunerkit.disabled(outer):
        assert (outer(toys.x()) == toys.net()(toys.x())).all()
    assert toys.close(tunerkit.merge(outer)(toys.x()), output)
    assert (tunerkit.unmerge(outer)(toys.x()) == output).all()
    assert tunerkit.unwrap(outer) is outer
    assert tuners_of(outer) == tuners_of(model) == {}


def test_a_plain_model_has_no_tuner(toys: "Toys") -> None:
    """The error says what to call."""
    with pytest.raises(AdapterError, match=r"Net has no adapter; call tunerkit\.wrap or tunerkit\.load"):
        tunerkit.tuner(toys.net())


def test_ranks_and_budget_of_a_method_without_a_schedule_are_constants(toys: "Toys") -> None:
    """Without hooks of its own a method's budget is the sum of its ranks, at any step; finish changes nothing."""
    tuner = tunerkit.tuner(tunerkit.wrap(toys.net(), "toy-low-rank", {"targets": ["conv", "layers.0"], "rank": 3}))
    for _ in range(2):
        assert tuner.ranks() == {"conv": 3, "layers.0": 3}
        assert [tuner.budget(step) for step in (None, 0, 10**6)] == [6, 6, 6]
        tuner.finish()
    assert tuner.history == []
    assert (tuner.steps, tuner.total_steps) == (0, None)
    assert tunerkit.tuner(tunerkit.wrap(toys.net(), "toy-shift")).budget() == 0


def test_what_it_holds_is_what_lies_in_the_model(toys: "Toys") -> None:
    """Slots cover targets, copies and biases, adapters the targets alone; parameters are those that are trained."""
    model = toys.trained()
    tuner = tunerkit.tuner(model)
    assert list(tuner.adapters()) == ["conv", "layers.0", "layers.1"]
    assert {path for path, _ in tuner.slots()} == {*tuner.adapters(), "head.0", "head.2", "norm", "group_norm"}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in tuner.parameters()} == trained


def test_an_adapter_torn_out_by_hand_is_said(toys: "Toys") -> None:
    """Code that replaces a layer takes its adapter away: the next question names the place."""
    model = toys.trained()
    tuner = tunerkit.tuner(model)
    del model.layers[0]._modules["tunerkit"]
    with pytest.raises(AdapterError, match=r"'default' is gone from the model at 'layers\.0'"):
        tuner.ranks()


def test_an_allocation_is_recorded_and_told_to_everybody(toys: "Toys") -> None:
    """Record notes step, budget and ranks in the history and tells every plugin; None is no allocation."""
    heard: list[Any] = []

    class Watcher:
        @tunerkit.hookimpl
        def tunerkit_ranks_changed(self, tuner: tunerkit.Tuner, change: tunerkit.RankChange) -> None:
            heard.append((tuner, change))

    tuner = tunerkit.tuner(tunerkit.wrap(toys.net(), "toy-low-rank", {"targets": ["conv"]}))
    watcher = Watcher()
    tunerkit.register(watcher)
    try:
        tuner.record(None)
        tuner.record({"conv": 1})
    finally:
        tunerkit.unregister(watcher)
    assert tuner.history == [tunerkit.RankChange(step=0, budget=2, ranks={"conv": 1})]
    assert heard == [(tuner, tuner.history[0])]


def test_an_adapter_that_does_not_say_what_it_adds_is_named() -> None:
    """The base class is abstract: its forward tells the author what to define, and it has no rank."""

    class Mute(Adapter):
        pass

    with pytest.raises(NotImplementedError, match=r"Mute does not say what it adds: define forward"):
        Mute()(None, None, None)
    assert Mute().rank == 0
