"""What is found at the next forward, or at saving, if an optimizer stepped an adapter that it does not drive."""

import functools
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

import tunerkit
from tests.support.model_checks import attached, each_copy, fit, sgd, silent, told
from tests.support.toys import OneMethod, Toys
from tunerkit.plugin import Method, optimizer_of
from tunerkit_testing.registering import registered
from tunerkit_testing.small import trainable
from tunerkit_testing.toy_methods import LowRankConfig, LowRankPlugin


def step(toys: "Toys", model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A step, and the forward of the next one."""
    fit(model, optimizer, toys.x())
    model(toys.x())


def said(toys: "Toys", model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """What is said of that in two steps."""
    texts = [text for _ in range(2) for text in told(lambda: step(toys, model, optimizer))]
    return [text for text in texts if "updates adapter" in text]


def wrapped(toys: "Toys", method: str = "toy-stepper", **options: Any) -> nn.Module:
    model: nn.Module = tunerkit.wrap(toys.net(), method, {"targets": ["layers.0"]}, **options)
    return model


NOTHING = r"is not attached to it: .* call tunerkit\.attach\(model, optimizer, total_steps=\.\.\.\), or with a Trainer"


def adamw(model: nn.Module, *, fused: bool = False) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model), fused=fused)


# Torch does not count the changes that a fused optimizer makes.
@pytest.mark.parametrize("make", [sgd, adamw, functools.partial(adamw, fused=True)], ids=["sgd", "adamw", "fused"])
def test_training_without_attach_stops_after_the_first_step_of_any_optimizer(toys: "Toys", make: Any) -> None:
    """The error has the line to add. A method that does not act on steps loses nothing and triggers nothing."""
    model = wrapped(toys)
    with pytest.raises(tunerkit.errors.StepError, match=NOTHING):
        step(toys, model, make(model))
    plain = wrapped(toys, "toy-low-rank")
    assert said(toys, plain, make(plain)) == []


class PenaltyPlugin(OneMethod, LowRankPlugin):
    """Adds a gradient in each step, and does nothing after it."""

    method = Method("penalty", config=LowRankConfig, needs_steps=True)

    @tunerkit.hookimpl
    def tunerkit_before_step(self) -> None:
        pass


def test_a_method_that_only_adds_gradients_stops_too(toys: "Toys") -> None:
    """Without attach the training would go on to its end, without the penalty."""
    with registered(PenaltyPlugin()):
        model = wrapped(toys, "penalty")
        with pytest.raises(tunerkit.errors.StepError, match=NOTHING):
            step(toys, model, sgd(model))


def test_the_optimizer_that_drives_triggers_no_warning(toys: "Toys") -> None:
    """The attached optimizer triggers no warning. A second optimizer that updates the same adapter does."""
    model = wrapped(toys)
    optimizer, second = sgd(model), sgd(model)
    tunerkit.attach(model, optimizer, total_steps=9)
    assert said(toys, model, optimizer) == []
    (text,) = said(toys, model, second)
    assert "not attached to it: another optimizer is" in text


def test_an_adapter_that_was_left_out_on_purpose_triggers_a_warning(toys: "Toys") -> None:
    """Its optimizer drives another one, so attach was not forgotten; it may be attached later."""
    model = wrapped(toys, adapter="a")
    tunerkit.wrap(model, "toy-stepper", {"targets": ["layers.1"]}, adapter="b")
    optimizer = sgd(model)
    tunerkit.attach(model, optimizer, total_steps=9, adapter="a")
    (text,) = said(toys, model, optimizer)
    assert "updates adapter 'b', but is not attached to it" in text
    tunerkit.attach(model, optimizer, total_steps=9, adapter="b")
    assert said(toys, model, optimizer) == []
    assert [tunerkit.tuner(model, name).steps for name in "ab"] == [4, 2]


@each_copy
def test_a_copied_optimizer_that_lost_its_hooks_stops_after_its_first_step(toys: "Toys", way: Any) -> None:
    """Model and optimizer copied together do not train on until the copy is attached: nothing drives it."""
    model = wrapped(toys)
    optimizer = attached(model, total_steps=9)
    twin, twin_optimizer = way((model, optimizer))
    with pytest.raises(tunerkit.errors.StepError, match="loses its hooks"):
        step(toys, twin, twin_optimizer)
    assert tunerkit.tuner(twin).steps == 0
    tunerkit.attach(twin, twin_optimizer, total_steps=9)
    assert said(toys, twin, twin_optimizer) == []
    assert tunerkit.tuner(twin).steps == 2
    assert tunerkit.tuner(model).steps == 0


def test_optimizers_of_other_models_are_left_alone(toys: "Toys") -> None:
    """An adapter that was removed, or that gets no gradient, triggers no warning either; nor do values set by hand."""
    model = wrapped(toys)
    other = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with silent(Warning):
        other(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        leftover = sgd(model)
        tunerkit.unwrap(model)
        leftover.step()
        torn = wrapped(toys)
        del torn.get_submodule("layers.0")._modules["tunerkit"]
        optimizer.step()
        filled = wrapped(toys)
        filled(toys.x())
        toys.fill_(filled)
        filled(toys.x())
    assert not torch.equal(other.bias, torch.zeros(2))


class QuietPlugin(OneMethod, LowRankPlugin):
    """Acts on steps, but could do without."""

    method = Method("quiet", config=LowRankConfig)

    @tunerkit.hookimpl
    def tunerkit_after_step(self) -> None:
        pass


def test_saving_tells_of_the_last_step(toys: "Toys", tmp_path: Path) -> None:
    """No forward comes after it. A method that needs steps is refused anyway."""
    with registered(QuietPlugin()):
        model = wrapped(toys, "quiet")
        optimizer = sgd(model)
        fit(model, optimizer, toys.x())
        with pytest.warns(tunerkit.TunerkitWarning, match="updates adapter 'default', but is not attached to it"):
            tunerkit.save(model, tmp_path)


def test_nothing_is_registered_for_all_optimizers_and_unwrapping_leaves_no_hook(toys: "Toys") -> None:
    """A model is watched by a hook of its own, and only for methods that act on steps."""

    def count() -> int:
        kinds = (torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks)
        return sum(len(kind) for kind in kinds)

    before, plain = count(), toys.net()
    hooks = len(wrapped(toys, "toy-low-rank")._forward_pre_hooks)
    model = wrapped(toys)
    tunerkit.attach(model, sgd(model), total_steps=9)
    assert len(model._forward_pre_hooks) == hooks + 1
    assert count() == before
    tunerkit.unwrap(model)
    assert len(model._forward_pre_hooks) == len(plain._forward_pre_hooks)
    assert vars(model).keys() == vars(plain).keys()


def test_closures_and_skipped_steps_of_the_own_optimizer_trigger_nothing(toys: "Toys") -> None:
    """LBFGS moves the weights between the forwards of one step."""
    model = wrapped(toys)
    optimizer = torch.optim.LBFGS(trainable(model), lr=0.1, max_iter=3)
    tunerkit.attach(model, optimizer, total_steps=9)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(toys.x()).square().mean()
        loss.backward()
        return loss

    with silent():
        for _ in range(2):
            optimizer.step(closure)
    assert tunerkit.tuner(model).steps == 2


def test_a_loaded_adapter_is_watched_too(toys: "Toys", tmp_path: Path) -> None:
    """A process may load an adapter that another process wrapped, and resume training it."""
    model = wrapped(toys)
    attached(model, total_steps=9)
    tunerkit.tuner(model).progress.steps = 1
    path = tunerkit.save(model, tmp_path)
    loaded = tunerkit.load(toys.net(), path, trainable=True)
    with pytest.raises(tunerkit.errors.StepError, match="is not attached to it"):
        step(toys, loaded, sgd(loaded))


UNPICKLE = """
import io, sys, torch
import tunerkit
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import ShiftPlugin
with registered(ShiftPlugin()):
    model = torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    try:
        model(torch.ones(2, 4))
    except tunerkit.errors.StepError as error:
        print(str(error).count("is not attached to it"))
"""


def test_a_process_that_only_unpickles_a_model_is_watched(toys: "Toys") -> None:
    """It calls neither wrap nor load nor attach, and forgetting attach is what the error is about."""
    model = tunerkit.wrap(nn.Sequential(nn.Linear(4, 4)), "toy-stepper", {"targets": ["0"]})
    file = io.BytesIO()
    torch.save(model, file)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", UNPICKLE]
    done = subprocess.run(command, input=file.getvalue(), capture_output=True, env=environment, check=False)
    assert done.stdout.strip() == b"1", done.stderr.decode()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_wrapped_model_is_pickled_with_every_protocol(toys: "Toys", protocol: int) -> None:
    """The tuner of the copy says the same, and no optimizer drives it."""
    model = wrapped(toys)
    tunerkit.attach(model, sgd(model), total_steps=9)
    twin = tunerkit.tuner(pickle.loads(pickle.dumps(model, protocol=protocol)))
    assert (twin.method, twin.total_steps, list(twin.adapters())) == ("toy-stepper", 9, list(twin.ranks()))
    assert optimizer_of(twin) is None


@pytest.mark.parametrize("run", ["forward", "compiled"])
def test_a_loop_that_never_calls_the_model_is_stopped_in_its_second_backward(toys: "Toys", run: str) -> None:
    """No hook of the model runs where its forward is called by hand, or compiled code is."""
    model = wrapped(toys)
    call: Any = model.forward if run == "forward" else torch.compile(model, backend="eager")
    optimizer = sgd(model)
    call(toys.x()).square().mean().backward()
    optimizer.step()
    loss = call(toys.x()).square().mean()
    with pytest.raises(tunerkit.errors.StepError, match=NOTHING):
        loss.backward()


def test_loaded_values_are_no_step(toys: "Toys") -> None:
    """Backwards without a step, and then the best weights so far, as at the end of a training: nothing is said."""
    model, driven = wrapped(toys), wrapped(toys)
    tunerkit.attach(driven, sgd(driven), total_steps=9)
    with silent(Warning):
        for each in (model, driven):
            best = {name: value + 1 for name, value in each.state_dict().items()}
            for _ in range(2):
                each(toys.x()).square().mean().backward()
            each.load_state_dict(best)
            each(toys.x())


def test_a_watched_model_is_converted_by_swapping_its_parameters(toys: "Toys") -> None:
    """Torch swaps no parameter to which a weak reference exists."""
    model = wrapped(toys)
    tunerkit.attach(model, sgd(model), total_steps=9)
    model(toys.x()).square().mean().backward()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert all(parameter.dtype == torch.float64 for parameter in model.parameters())
