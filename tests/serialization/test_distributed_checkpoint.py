"""Torch's distributed checkpoint beside an attached adapter: the step it takes, and the states it wants."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict, state_dict_loader, state_dict_saver

import tunerkit
from tests.support.model_checks import fit, nudge_, told
from tests.support.toys import OneMethod, Toys
from tunerkit.plugin import Method, State, Tuner
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import LowRankConfig, LowRankPlugin

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

Adam = torch.optim.Adam


def momentum(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


class HoldingPlugin(OneMethod, LowRankPlugin):
    """``holding``: trains ``a`` alone, since it withholds ``b`` from every step, and notes which hooks fire."""

    method = Method("holding", config=LowRankConfig, needs_steps=True)

    def __init__(self) -> None:
        self.fired: list[str] = []

    @tunerkit.hookimpl
    def tunerkit_before_step(self, tuner: Tuner) -> list[nn.Parameter]:
        self.fired.append("before")
        return [adapter.get_parameter("b") for adapter in tuner.adapters().values()]

    @tunerkit.hookimpl
    def tunerkit_after_step(self) -> None:
        self.fired.append("after")

    @tunerkit.hookimpl
    def tunerkit_state(self, tuner: Tuner) -> State:
        return State(tensors={}, values={})

    @tunerkit.hookimpl
    def tunerkit_restore(self, tuner: Tuner, state: State) -> None:
        pass


@pytest.fixture
def holding() -> Iterator[HoldingPlugin]:
    plugin = HoldingPlugin()
    with registered(plugin):
        yield plugin


def wrapped(toys: "Toys") -> Any:
    return tunerkit.wrap(toys.net(), "holding", {"targets": ["layers.0", "layers.1"]}, seed=0)


def attached(toys: "Toys", kind: Callable[..., Any] = Adam) -> tuple[Any, Any]:
    model = nudge_(wrapped(toys))
    optimizer = kind(list(tunerkit.tuner(model).parameters()), lr=0.1)
    tunerkit.attach(model, optimizer, total_steps=9)
    return model, optimizer


@pytest.mark.parametrize("kind", [Adam, torch.optim.SGD])
def test_that_step_is_not_a_step_of_the_training(
    toys: "Toys", holding: HoldingPlugin, kind: Callable[..., Any]
) -> None:
    """No hook fires, also for an optimizer without state; the next step is the first, and one at a rate of 0 counts."""
    model, optimizer = attached(toys, kind)
    before = [parameter.detach().clone() for parameter in tunerkit.tuner(model).parameters()]
    state_dict.get_state_dict(model, optimizer)
    assert holding.fired == []
    assert tunerkit.tuner(model).steps == 0
    assert all(torch.equal(a, b) for a, b in zip(before, tunerkit.tuner(model).parameters(), strict=True))
    for number, rate in enumerate((0.1, 0.0), 1):
        optimizer.param_groups[0]["lr"] = rate
        fit(model, optimizer, toys.x(), 1)
        assert holding.fired == ["before", "after"] * number
        assert tunerkit.tuner(model).steps == number


def test_an_adapter_that_is_not_attached_yet_does_not_stop_it(toys: "Toys", holding: HoldingPlugin) -> None:
    """A real step would be refused: nothing drives the adapter."""
    model = wrapped(toys)
    optimizer = Adam(list(tunerkit.tuner(model).parameters()))
    assert told(lambda: state_dict.get_optimizer_state_dict(model, optimizer)) == []
    with pytest.raises(tunerkit.errors.StepError, match="is not attached to it"):
        fit(model, optimizer, toys.x(), 2)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("kind", [Adam, torch.optim.NAdam, momentum])
def test_a_withheld_parameter_has_a_state_in_the_checkpoint_and_training_goes_on_exactly(
    toys: "Toys", holding: HoldingPlugin, kind: Callable[..., Any], flatten: bool, tmp_path: Path
) -> None:
    """Torch rejects a checkpoint without one. The files of tunerkit and the checkpoint together resume bit for bit."""
    options = state_dict.StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = attached(toys, kind)
    fit(model, optimizer, toys.x(), 3)
    assert len(optimizer.state) == 2
    tunerkit.save_state(model, tmp_path)
    saved = state_dict.get_state_dict(model, optimizer, options=options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        state_dict_saver.save({"both": list(saved)}, checkpoint_id=tmp_path / "checkpoint")
        again, other = attached(toys, kind)
        kept: dict[str, Any] = {"both": list(state_dict.get_state_dict(again, other, options=options))}
        state_dict_loader.load(kept, checkpoint_id=tmp_path / "checkpoint")
    tunerkit.load_state(again, tmp_path)
    weights, states = kept["both"]  # Any: torch's types of what it returns and takes do not fit
    given: Any = {"model_state_dict": weights, "optim_state_dict": states, "options": options}
    assert told(lambda: state_dict.set_state_dict(again, other, **given)) == []
    assert tunerkit.tuner(again).steps == 3
    for each in ((model, optimizer), (again, other)):
        fit(*each, toys.x(), 3)
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


@pytest.mark.skipif(torch.__version__ < "2.10", reason="torch 2.9 raises a KeyError, also with strict=False")
def test_states_of_other_shapes_are_left_to_torch(toys: "Toys", holding: HoldingPlugin) -> None:
    """Adafactor keeps rows and columns: nothing is made up for it, and torch says what to do."""
    model, optimizer = attached(toys, torch.optim.Adafactor)
    fit(model, optimizer, toys.x(), 1)
    kept = state_dict.get_optimizer_state_dict(model, optimizer)
    again, other = attached(toys, torch.optim.Adafactor)
    with pytest.raises(RuntimeError, match="strict=False"):
        state_dict.set_optimizer_state_dict(again, other, kept)
    options = state_dict.StateDictOptions(strict=False)
    with pytest.warns(tunerkit.TunerkitWarning, match="tunerkit.save_state beside the checkpoint"):
        state_dict.set_optimizer_state_dict(again, other, kept, options=options)


def test_a_state_dict_outside_of_it_is_torch_s_own(toys: "Toys", holding: HoldingPlugin) -> None:
    """Nothing is added to what other loops save."""
    model, optimizer = attached(toys)
    fit(model, optimizer, toys.x(), 1)
    assert set(optimizer.state_dict()["state"]) == {0, 2}


class Summing(torch.optim.Optimizer):
    """An optimizer of another library: its state has the name of Adagrad's, and it has no such setting."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                self.state[parameter].setdefault("sum", torch.zeros_like(parameter)).add_(parameter.grad)


BEGUN: dict[Any, dict[str, float]] = {
    Adam: {"step": 0.0, "exp_avg": 0.0, "exp_avg_sq": 0.0},
    torch.optim.Rprop: {"step": 0.0, "prev": 0.0, "step_size": 0.1},
    Summing: {"sum": 0.0},
}


@pytest.mark.parametrize("kind", BEGUN)
def test_an_added_state_is_that_of_a_parameter_without_steps(toys: "Toys", holding: HoldingPlugin, kind: Any) -> None:
    """0 everywhere, the count of steps too, also for an optimizer of another library; Rprop begins at its rate."""
    model, optimizer = attached(toys, kind)
    fit(model, optimizer, toys.x(), 3)
    states: Any = state_dict.get_optimizer_state_dict(model, optimizer)["state"]
    added = [state for name, state in states.items() if name.endswith(".b")]
    found = [{name: value.unique().tolist() for name, value in state.items()} for state in added]
    assert found == [{name: pytest.approx([first]) for name, first in BEGUN[kind].items()}] * 2
