"""Attaching to a transformers Trainer: its loop drives, its global step is the clock."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

import tunerkit
from tests.support.noting import NotingPlugin, calls_of, hooks_of, per_step
from tests.support.trainer_toys import Regression, RegressionRows, arguments
from tunerkit.errors import AdapterError
from tunerkit.plugin import Tuner
from tunerkit.steps import is_attached
from tunerkit_testing.registering import registered

ROWS = RegressionRows()


@pytest.fixture(autouse=True)
def _noting() -> Iterator[None]:
    with registered(NotingPlugin()):
        yield


def wrapped(**config: Any) -> nn.Module:
    return tunerkit.wrap(Regression(), "noting-stepper", {"targets": ["first", "second"], **config})


def trainer_of(model: nn.Module, folder: Path, **options: Any) -> Trainer:
    return Trainer(model, arguments(folder, **{"max_steps": 6, "learning_rate": 0.1, **options}), train_dataset=ROWS)


def assert_stepped(tuner: Tuner, count: int) -> None:
    """Check that each hook was called once in each step, when every parameter had a gradient."""
    assert hooks_of(tuner) == per_step(count)
    grads = [grad for call in calls_of(tuner) for grad in call.grads]
    assert all(grad is not None and bool(grad.any()) for grad in grads)


@pytest.mark.parametrize(
    ("options", "total"),
    [
        ({"max_steps": 6}, 6),
        ({"max_steps": -1, "num_train_epochs": 2}, 8),
        ({"max_steps": 5, "gradient_accumulation_steps": 3}, 5),
        ({"max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 2}, 6),
        ({"max_steps": 4, "optim": "sgd"}, 4),
        ({"max_steps": 4, "optim": "adamw_torch"}, 4),
    ],
)
def test_one_line_trains_with_the_trainers_total_and_clock(options: dict[str, Any], total: int, tmp_path: Path) -> None:
    """By steps or epochs, accumulating or not: the total is the trainer's, and hooks fire once per global step."""
    model = wrapped()
    trainer = trainer_of(model, tmp_path, **options)
    tunerkit.attach(model, trainer)
    before = [p.detach().clone() for p in tunerkit.tuner(model).parameters()]
    trainer.train()
    tuner = tunerkit.tuner(model)
    assert (tuner.total_steps, tuner.steps, trainer.state.global_step) == (total, total, total)
    assert_stepped(tuner, total)
    assert not any(torch.equal(p, old) for p, old in zip(tuner.parameters(), before, strict=True))


def test_the_tuners_steps_are_the_global_step(tmp_path: Path) -> None:
    """At the end of every step, a callback sees equal counts."""
    model = wrapped()
    trainer = trainer_of(model, tmp_path)
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append((state.global_step, tunerkit.tuner(model).steps))

    trainer.add_callback(Watch())
    tunerkit.attach(model, trainer)
    trainer.train()
    assert seen == [(step, step) for step in range(1, 7)]


def test_a_total_that_agrees_is_accepted(tmp_path: Path) -> None:
    """Passing the same total in the call and in the config is no error."""
    model = wrapped(total_steps=6)
    trainer = trainer_of(model, tmp_path)
    tunerkit.attach(model, trainer, total_steps=6)
    trainer.train()
    assert tunerkit.tuner(model).steps == 6


@pytest.mark.parametrize("place", ["config", "call"])
def test_a_disagreeing_total_is_refused_before_any_step(place: str, tmp_path: Path) -> None:
    """The error has both numbers, nothing is trained, and nothing stays attached."""
    model = wrapped(total_steps=7 if place == "config" else None)
    trainer = trainer_of(model, tmp_path)
    tunerkit.attach(model, trainer, total_steps=7 if place == "call" else None)
    with pytest.raises(tunerkit.errors.StepError, match=r"total_steps=7.* 6\b"):
        trainer.train()
    assert tunerkit.tuner(model).steps == 0
    assert not is_attached(tunerkit.tuner(model))


def test_a_trainer_of_another_model_is_refused(tmp_path: Path) -> None:
    """It would never step the adapter."""
    trainer = trainer_of(wrapped(), tmp_path)
    with pytest.raises(tunerkit.errors.StepError, match="another model"):
        tunerkit.attach(wrapped(), trainer)


def test_attaching_twice_is_refused(tmp_path: Path) -> None:
    """To the same trainer again, to a trainer in addition to an optimizer, or to an optimizer during training."""
    model = wrapped()
    trainer = trainer_of(model, tmp_path)
    tunerkit.attach(model, trainer)
    with pytest.raises(tunerkit.errors.StepError, match="already"):
        tunerkit.attach(model, trainer)
    trainer.train()
    assert_stepped(tunerkit.tuner(model), 6)
    other = wrapped()
    optimizer = torch.optim.SGD(tunerkit.tuner(other).parameters(), lr=0.1)
    tunerkit.attach(other, optimizer, total_steps=3)
    with pytest.raises(tunerkit.errors.StepError, match="already"):
        tunerkit.attach(other, trainer_of(other, tmp_path))


def test_the_end_of_training_detaches(tmp_path: Path) -> None:
    """After it, the trainer's optimizer drives nothing, and the model can be attached to another."""
    model = wrapped()
    trainer = trainer_of(model, tmp_path)
    tunerkit.attach(model, trainer)
    trainer.train()
    assert not is_attached(tunerkit.tuner(model))
    assert trainer.optimizer is not None
    trainer.optimizer.step()
    assert tunerkit.tuner(model).steps == 6
    tunerkit.attach(model, torch.optim.SGD(tunerkit.tuner(model).parameters(), lr=0.1), total_steps=3)
    assert tunerkit.tuner(model).steps == 0


def test_a_second_train_restarts(tmp_path: Path) -> None:
    """One attach covers every call of train(): state and count restart."""
    model = wrapped()
    trainer = trainer_of(model, tmp_path)
    tunerkit.attach(model, trainer)
    trainer.train()
    first = tunerkit.tuner(model).state
    trainer.train()
    assert tunerkit.tuner(model).state is not first
    assert_stepped(tunerkit.tuner(model), 6)
    assert tunerkit.tuner(model).steps == 6


def test_training_that_an_exception_ended_can_be_started_again(tmp_path: Path) -> None:
    """The interrupted run left the adapter attached; the next run restarts instead of raising an error."""
    model = wrapped()
    trainer = trainer_of(model, tmp_path)

    class Interrupt(TrainerCallback):
        armed = True

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.armed and state.global_step == 2:
                self.armed = False
                raise KeyboardInterrupt

    trainer.add_callback(Interrupt())
    tunerkit.attach(model, trainer)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert tunerkit.tuner(model).steps == 2
    trainer.train()
    assert_stepped(tunerkit.tuner(model), 6)


def test_training_that_a_keystroke_ended_leaves_the_adapter_to_another_trainer(tmp_path: Path) -> None:
    """As in a notebook, where you interrupt and build a new Trainer around the same model."""
    model = wrapped()
    trainer = trainer_of(model, tmp_path)

    class Interrupt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    trainer.add_callback(Interrupt())
    tunerkit.attach(model, trainer)
    with pytest.raises(KeyboardInterrupt) as kept:  # and the traceback holds every frame of the training
        trainer.train()
    other = trainer_of(model, tmp_path)
    tunerkit.attach(model, other)
    other.train()
    assert_stepped(tunerkit.tuner(model), 6)
    assert kept.traceback


def test_a_trainers_optimizer_wrapper_with_a_separate_state_is_refused(tmp_path: Path) -> None:
    """As in `tunerkit.attach`, also through accelerate's wrapper; nothing is attached after the error."""
    model = wrapped()
    trainer = trainer_of(model, tmp_path)
    outer, inner = (torch.optim.SGD(tunerkit.tuner(model).parameters(), lr=0.1) for _ in range(2))
    trainer.optimizer = outer
    outer.optimizer = inner  # type: ignore[attr-defined]  # where wrappers keep what they wrap
    tunerkit.attach(model, trainer)
    with pytest.raises(tunerkit.errors.StepError, match=r"SGD keeps its own state beside the state of SGD"):
        trainer.train()
    assert not is_attached(tunerkit.tuner(model))


def test_an_adapter_attached_while_the_trainer_trains_is_driven_from_there_on(tmp_path: Path) -> None:
    """This requires that the optimizer contains it; otherwise attach raises an error."""
    model = tunerkit.wrap(wrapped(), "noting-stepper", {"targets": ["first"]}, adapter="late")
    trainer = trainer_of(model, tmp_path)

    class Add(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                tunerkit.attach(model, trainer, adapter="late")
                tunerkit.wrap(model, "noting-stepper", {"targets": ["first"]}, adapter="stranger")
                with pytest.raises(tunerkit.errors.StepError, match="has none of the parameters"):
                    tunerkit.attach(model, trainer, adapter="stranger")

    trainer.add_callback(Add())
    tunerkit.attach(model, trainer, adapter="default")
    trainer.train()
    assert [tunerkit.tuner(model, name).steps for name in ("default", "late", "stranger")] == [6, 6, 0]
    assert tunerkit.tuner(model, "late").total_steps == 6


@pytest.mark.parametrize("attached", [False, True])
def test_training_a_merged_model_is_refused(attached: bool, tmp_path: Path) -> None:
    """At attach, and at the start of training if the model was merged after it."""
    model = wrapped()
    trainer = Trainer(model, arguments(tmp_path, max_steps=2), train_dataset=ROWS)
    if attached:
        tunerkit.attach(model, trainer)
    tunerkit.merge(model)
    with pytest.raises(AdapterError, match=r"merged; call tunerkit\.unmerge before attaching"):
        trainer.train() if attached else tunerkit.attach(model, trainer)
    tunerkit.unmerge(model)
    if not attached:
        tunerkit.attach(model, trainer)
    trainer.train()
    assert tunerkit.tuner(model).steps == 2
