"""The watch for optimizers that step an adapter without driving it."""

import copy
import io
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import tunerkit
from tunerkit.steps import undriven
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import LowRankConfig, LowRankPlugin

if TYPE_CHECKING:
    from tests.support.toys import Toys


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def step(toys: "Toys", model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(toys.x()).square().mean().backward()
    optimizer.step()


def told(toys: "Toys", model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 2) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(count):
            step(toys, model, optimizer)
    return [str(w.message) for w in found if "steps adapter" in str(w.message)]


def wrapped(toys: "Toys", method: str = "toy-stepper", **options: Any) -> nn.Module:
    model: nn.Module = tunerkit.wrap(toys.net(), method, {"targets": ["layers.0"]}, **options)
    return model


NOTHING = r"nothing drives it: .* call tunerkit\.attach\(model, optimizer, total_steps=\.\.\.\), or with a Trainer"


def test_training_without_attach_stops_at_the_first_step(toys: "Toys") -> None:
    """The error has the line to add. A method that does not act on steps loses nothing and triggers nothing."""
    model = wrapped(toys)
    with pytest.raises(tunerkit.StepError, match=NOTHING):
        step(toys, model, sgd(model))
    plain = wrapped(toys, "toy-low-rank")
    assert told(toys, plain, sgd(plain)) == []


class PenaltyPlugin(LowRankPlugin):
    """Adds a gradient in each step, and does nothing after it."""

    @tunerkit.hookimpl
    def tunerkit_methods(self) -> list[tunerkit.Method]:
        return [tunerkit.Method("penalty", config=LowRankConfig, needs_steps=True)]

    @tunerkit.hookimpl
    def tunerkit_before_step(self) -> None:
        pass


def test_a_method_that_only_adds_gradients_stops_too(toys: "Toys") -> None:
    """Without attach the training would go on to its end, without the penalty."""
    with registered(PenaltyPlugin()):
        model = wrapped(toys, "penalty")
        with pytest.raises(tunerkit.StepError, match=NOTHING):
            step(toys, model, sgd(model))


def test_the_optimizer_that_drives_triggers_no_warning(toys: "Toys") -> None:
    """The attached optimizer triggers no warning. A second optimizer that updates the same adapter does."""
    model = wrapped(toys)
    optimizer, second = sgd(model), sgd(model)
    tunerkit.attach(model, optimizer, total_steps=9)
    assert told(toys, model, optimizer) == []
    (text,) = told(toys, model, second)
    assert "another optimizer drives it" in text


def test_an_adapter_that_was_left_out_on_purpose_triggers_a_warning(toys: "Toys") -> None:
    """Its optimizer drives another one, so attach was not forgotten; it may be attached later."""
    model = wrapped(toys, adapter="a")
    tunerkit.wrap(model, "toy-stepper", {"targets": ["layers.1"]}, adapter="b")
    optimizer = sgd(model)
    tunerkit.attach(model, optimizer, total_steps=9, adapter="a")
    (text,) = told(toys, model, optimizer)
    assert "steps adapter 'b', but nothing drives it" in text
    tunerkit.attach(model, optimizer, total_steps=9, adapter="b")
    assert told(toys, model, optimizer) == []
    assert [tunerkit.tuner(model, name).steps for name in "ab"] == [4, 2]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_a_copied_optimizer_that_lost_its_hooks_stops_at_its_first_step(toys: "Toys", copied: Any) -> None:
    """Model and optimizer copied together do not train on until the copy is attached: nothing drives it."""
    model = wrapped(toys)
    optimizer = sgd(model)
    tunerkit.attach(model, optimizer, total_steps=9)
    twin, twin_optimizer = copied((model, optimizer))
    with pytest.raises(tunerkit.StepError, match="lost its hooks"):
        step(toys, twin, twin_optimizer)
    assert tunerkit.tuner(twin).steps == 0
    tunerkit.attach(twin, twin_optimizer, total_steps=9)
    assert told(toys, twin, twin_optimizer) == []
    assert tunerkit.tuner(twin).steps == 2
    assert tunerkit.tuner(model).steps == 0


def test_optimizers_of_other_models_are_left_alone(toys: "Toys") -> None:
    """An adapter that was removed, or that gets no gradient, triggers no warning either."""
    model = wrapped(toys)
    other = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        leftover = sgd(model)
        tunerkit.unwrap(model)
        leftover.step()
        torn = wrapped(toys)
        del torn.get_submodule("layers.0")._modules["tunerkit"]
        optimizer.step()
    assert not torch.equal(other.bias, torch.zeros(2))


def test_a_compiled_step_of_any_optimizer_is_not_broken(toys: "Toys") -> None:
    """The hook is registered for every optimizer of the process: in compiled code it must disappear."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    before = model.weight.detach().clone()
    torch.compile(optimizer.step, backend="eager")()
    assert torch.equal(model.weight, before - 0.1)


SCRIPT = """
import torch
from torch.optim import optimizer

def count():
    return len(optimizer._global_optimizer_pre_hooks) + len(optimizer._global_optimizer_post_hooks)

import tunerkit
from tests.support.toys import LowRankPlugin, ShiftPlugin

counts = [count()]
tunerkit.register(LowRankPlugin())
tunerkit.register(ShiftPlugin())
for method in ("toy-low-rank", "toy-stepper", "toy-stepper"):
    model = tunerkit.wrap(torch.nn.Sequential(torch.nn.Linear(2, 2)), method, {"targets": ["0"]})
    counts.append(count())
print(counts)
"""


def environment() -> dict[str, str]:
    """The environment of a process that finds what this one can import."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_the_hook_for_all_optimizers_comes_with_the_first_adapter_that_acts_on_steps() -> None:
    """Importing tunerkit registers nothing in torch, nor does a method that ignores steps.

    Any other method registers one hook.
    """
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.stdout.strip() == "[0, 0, 1, 1]", done.stderr


def test_a_loaded_adapter_is_watched_too(toys: "Toys", tmp_path: Path) -> None:
    """A process may load an adapter that another process wrapped, and resume training it."""
    model = wrapped(toys)
    tunerkit.attach(model, sgd(model), total_steps=9)
    tunerkit.tuner(model).progress.steps = 1
    path = tunerkit.save(model, tmp_path)
    loaded = tunerkit.load(toys.net(), path, trainable=True)
    with pytest.raises(tunerkit.StepError, match="nothing drives it"):
        step(toys, loaded, sgd(loaded))


def test_attaching_watches_where_nothing_was_wrapped(toys: "Toys", monkeypatch: pytest.MonkeyPatch) -> None:
    """A spawned worker gets a wrapped model by pickle, and never calls wrap itself."""
    model = wrapped(toys)
    registered: list[object] = []
    monkeypatch.setattr(undriven, "_watch", undriven._Watch())
    monkeypatch.setattr(undriven, "register_optimizer_step_post_hook", registered.append)
    for _ in range(2):
        twin = copy.deepcopy(model)
        tunerkit.attach(twin, sgd(twin), total_steps=9)
    assert registered == [undriven.report_undriven_steps]


UNPICKLE = """
import io, sys, torch
import tunerkit
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import ShiftPlugin
with registered(ShiftPlugin()):
    model = torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.ones(2, 4)).sum().backward()
    try:
        optimizer.step()
    except tunerkit.StepError as error:
        print(str(error).count("nothing drives it"))
"""


def test_a_process_that_only_unpickles_a_model_is_watched(toys: "Toys") -> None:
    """It calls neither wrap nor load nor attach, and forgetting attach is what the error is about."""
    model = tunerkit.wrap(nn.Sequential(nn.Linear(4, 4)), "toy-stepper", {"targets": ["0"]})
    file = io.BytesIO()
    torch.save(model, file)
    command = [sys.executable, "-c", UNPICKLE]
    done = subprocess.run(command, input=file.getvalue(), capture_output=True, env=environment(), check=False)
    assert done.stdout.strip() == b"1", done.stderr.decode()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_wrapped_model_is_pickled_with_every_protocol(toys: "Toys", protocol: int) -> None:
    """The tuner of the copy says the same, and no optimizer drives it."""
    model = wrapped(toys)
    tunerkit.attach(model, sgd(model), total_steps=9)
    twin = tunerkit.tuner(pickle.loads(pickle.dumps(model, protocol=protocol)))
    assert (twin.method, twin.total_steps, list(twin.adapters())) == ("toy-stepper", 9, list(twin.ranks()))
    assert tunerkit.optimizer_of(twin) is None
