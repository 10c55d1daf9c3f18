"""The handle on one adapter: found by name or not, and what it reports without any step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tunerkit
from tests.support.toys import OneMethod, Toys
from tunerkit.errors import AdapterError, TunerkitWarning
from tunerkit.injection import slots_in, tuners_of
from tunerkit.layers import Adapter
from tunerkit.plugin import Method, Tuner
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import LowRankConfig, LowRankPlugin


def test_a_tuner_is_found_by_name_or_alone(toys: "Toys") -> None:
    """A single adapter needs no name; with two, the name decides; for an unknown name the error lists the closest."""
    model = tunerkit.wrap(toys.net(), "toy-low-rank", adapter="first")
    assert tunerkit.tuner(model) is tunerkit.tuner(model, "first")
    tunerkit.wrap(model, "toy-shift", adapter="second")
    with pytest.raises(AdapterError, match=r"several adapters: first, second; choose one with adapter="):
        tunerkit.tuner(model)
    assert tunerkit.tuner(model, "second").method == "toy-shift"
    for wrong in ("frist", 3, ["first"]):
        with pytest.raises(AdapterError, match=r"no adapter named .*there are: first, second"):
            tunerkit.tuner(model, wrong)  # type: ignore[arg-type]
    for ask in (tunerkit.tuner, lambda model, name: tunerkit.save(model, "never", adapter=name)):
        with pytest.raises(AdapterError, match="did you mean 'first'"):
            ask(model, "frist")


def test_wrappers_around_the_model_are_seen_through(toys: "Toys") -> None:
    """DDP, value heads and others contain the model: every call finds the adapters in it."""
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


CALLS: dict[str, Callable[[nn.Module, Path], object]] = {
    "tuner": lambda model, path: tunerkit.tuner(model, "default"),
    "adapters": lambda model, path: tunerkit.adapters(model),
    "attach": lambda model, path: tunerkit.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=3),
    "merge": lambda model, path: tunerkit.merge(model),
    "unwrap": lambda model, path: tunerkit.unwrap(model),
    "save": lambda model, path: tunerkit.save(model, path),
    "wrap": lambda model, path: tunerkit.wrap(model, "toy-shift", adapter="third"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
@pytest.mark.parametrize("second", ["default", "other"])
def test_separately_wrapped_parts_are_named(
    toys: "Toys", tmp_path: Path, call: Callable[[nn.Module, Path], object], second: str
) -> None:
    """If two parts were wrapped separately, asking the whole model raises an error with both names; nothing changes."""
    parts = {name: toys.net() for name in ("text", "image")}
    model = nn.ModuleDict(parts)
    for part, adapter in zip(parts.values(), ("default", second), strict=True):
        toys.fill_(tunerkit.wrap(part, "toy-low-rank", {"targets": ["conv"]}, adapter=adapter, seed=3))
    before = toys.snapshot(model)
    with pytest.raises(AdapterError, match=r"ModuleDict were wrapped separately: 'text', 'image'; pass one"):
        call(model, tmp_path)
    assert toys.same(toys.snapshot(model), before)
    assert not list(tmp_path.iterdir())
    output = parts["text"](toys.x())
    assert toys.close(tunerkit.merge(parts["text"])(toys.x()), output)
    for part in parts.values():
        tunerkit.unwrap(part)
    assert tunerkit.adapters(model) == {}


@pytest.mark.parametrize(
    "call",
    [
        *(tunerkit.tuner, tunerkit.adapters, tunerkit.active, tunerkit.merge, tunerkit.unmerge, tunerkit.unwrap),
        tunerkit.trainable_parameters,
        lambda thing: tunerkit.disabled(thing).__enter__(),
        lambda thing: tunerkit.attach(thing, nn.Linear(2, 2)),
        lambda thing: tunerkit.save(thing, "never"),
        lambda thing: tunerkit.load(thing, "never"),
        lambda thing: tunerkit.delete(thing, "default"),
        lambda thing: tunerkit.save_state(thing, "never"),
        lambda thing: tunerkit.load_state(thing, "never"),
    ],
)
@pytest.mark.parametrize("thing", [None, "bert", [nn.Linear(2, 2)], torch.optim.SGD([nn.Parameter(torch.ones(1))])])
def test_what_is_no_model_is_refused_by_its_type(call: Callable[[Any], object], thing: object) -> None:
    """None, a name, a list or an optimizer instead of a model raises our error, in every function."""
    with pytest.raises(AdapterError, match=rf"expected a torch\.nn\.Module, got {type(thing).__name__}; pass"):
        call(thing)


def test_a_part_wrapped_after_the_whole_is_named(toys: "Toys") -> None:
    """The whole model keeps training its adapter. Other calls on it name both, and the part can be unwrapped."""
    model = tunerkit.wrap(toys.net(), "toy-shift", {"targets": ["conv"]})
    whole = tunerkit.tuner(model)
    tunerkit.wrap(model.head, "toy-shift", {"targets": ["0"]})
    with pytest.raises(AdapterError, match=r"Net were wrapped separately: the model itself, 'head'"):
        tunerkit.merge(model)
    assert len(list(whole.parameters())) == 1
    tunerkit.unwrap(model.head)
    assert tunerkit.tuner(model) is whole


@pytest.mark.parametrize(
    "call",
    [
        *(tunerkit.tuner, tunerkit.unwrap, tunerkit.merge, tunerkit.unmerge),
        lambda model: tunerkit.disabled(model).__enter__(),
        lambda model: tunerkit.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=5),
        lambda model: tunerkit.activate(model, []),
        lambda model: tunerkit.freeze(model, "a"),
        lambda model: tunerkit.save(model, "never"),
        lambda model: tunerkit.param_groups(model, lr=1.0),
    ],
)
def test_a_plain_model_has_no_tuner(toys: "Toys", call: Callable[[Any], object]) -> None:
    """Nor anything to change, train or save; the error says which function to call. Asking which there are works."""
    with pytest.raises(AdapterError, match=r"Net has no adapter; call tunerkit\.wrap or tunerkit\.load"):
        call(toys.net())
    assert tunerkit.adapters(toys.net()) == {}
    assert tunerkit.active(toys.net()) == ()


def test_ranks_and_budget_of_a_method_without_a_schedule_are_constants(toys: "Toys") -> None:
    """Without hooks, a method's budget is the sum of its ranks at any step; `finish` changes nothing."""
    tuner = tunerkit.tuner(tunerkit.wrap(toys.net(), "toy-low-rank", {"targets": ["conv", "layers.0"], "rank": 3}))
    for _ in range(2):
        assert tuner.ranks() == {"conv": 3, "layers.0": 3}
        assert [tuner.budget(step) for step in (None, 0, 10**6)] == [6, 6, 6]
        tuner.finish()
    assert tuner.history == []
    assert (tuner.steps, tuner.total_steps) == (0, None)
    assert tunerkit.tuner(tunerkit.wrap(toys.net(), "toy-shift")).budget() == 0


def test_what_it_returns_is_what_the_model_contains(toys: "Toys") -> None:
    """Slots cover targets, copies and biases, adapters only targets; parameters are the trained ones."""
    model = toys.trained()
    tuner = tunerkit.tuner(model)
    assert list(tuner.adapters()) == ["conv", "layers.0", "layers.1"]
    assert {path for path, _ in slots_in(tuner)} == {*tuner.adapters(), "head.0", "head.2", "norm", "group_norm"}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in tuner.parameters()} == trained


def test_an_adapter_removed_by_hand_is_reported(toys: "Toys") -> None:
    """Code that replaces a layer removes its adapter: the next call raises an error with the path."""
    model = toys.trained()
    tuner = tunerkit.tuner(model)
    del model.layers[0]._modules["tunerkit"]
    with pytest.raises(AdapterError, match=r"'default' is gone from the model at 'layers\.0'"):
        tuner.ranks()


class HalvingPlugin(OneMethod, LowRankPlugin):
    """Halves its parameters in the final allocation."""

    method = Method("halving", config=LowRankConfig)

    @tunerkit.hookimpl
    def tunerkit_finish(self, tuner: Tuner) -> None:
        for parameter in tuner.parameters():
            parameter.mul_(0.5)


def test_the_final_allocation_may_change_parameters_in_place(toys: "Toys") -> None:
    """As in each step, no gradients are recorded while the hook runs."""
    with registered(HalvingPlugin()):
        tuner = tunerkit.tuner(tunerkit.wrap(toys.net(), "halving", {"targets": ["conv"]}))
        before = [parameter.detach().clone() for parameter in tuner.parameters()]
        tuner.finish()
        assert all(torch.equal(p, 0.5 * old) for p, old in zip(tuner.parameters(), before, strict=True))


def test_groups_of_layers_are_counted_no_more(toys: "Toys") -> None:
    """For one version, the call says so."""
    tuner = tunerkit.tuner(tunerkit.wrap(toys.net(), "toy-low-rank", {"targets": ["conv"]}))
    with pytest.warns(TunerkitWarning, match=r"no longer grouped.*Remove the call"):
        assert tuner.groups() == {}


def test_an_adapter_that_does_not_say_what_it_adds_is_named() -> None:
    """The base class is abstract: its forward tells plugin authors what to define, and it has no rank."""

    class Mute(Adapter):
        pass

    with pytest.raises(NotImplementedError, match=r"Mute has no forward: define forward"):
        Mute()(None, None, None)
    assert Mute().rank == 0
