"""Trainers of an unknown library: a plugin attaches to them without a line in core, and with the public names alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tunerkit
from tests.support.toys import registering
from tunerkit.plugin import Tuner, optimizer_of
from tunerkit.plugin.trainers import detach, drive, engine_for, folder_of, is_attached, restore_, save_tuner
from tunerkit_testing.registering import registered
from tunerkit_testing.small import X, net, trainable
from tunerkit_testing.toy_methods import LowRankPlugin

TARGETS = {"targets": ["0", "2"]}


class Loop:
    """A trainer that counts its own steps, may skip some, and writes checkpoints through whoever attaches to it."""

    def __init__(self, model: nn.Module, steps: int, skipped: frozenset[int] = frozenset()) -> None:
        self.model, self.steps = model, steps
        self.step, self.skipped = 0, skipped
        self.driving: Driving | None = None

    def run(self) -> None:
        optimizer = torch.optim.SGD(trainable(self.model), lr=0.1)
        assert self.driving is not None
        self.driving.begin(optimizer)
        while self.step < self.steps:
            self.model(X).square().sum().backward()
            if self.step not in self.skipped:
                optimizer.step()
            optimizer.zero_grad()
            self.step += 1
        self.driving.end()


class Driving:
    """Drives adapters by the trainer's steps, and writes them into its checkpoints."""

    def __init__(self, loop: Loop, tuners: Sequence[Tuner], data_parallel: bool | None) -> None:
        self.loop, self.tuners, self.data_parallel = loop, tuners, data_parallel
        self.resumed: Path | None = None

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        engine, candidate = engine_for(self.tuners, self.loop.model, optimizer, self.data_parallel)
        steps, clock = self.loop.steps, lambda: self.loop.step + 1
        drive(self.tuners, candidate, total_steps=steps, clock=clock, engine=engine)
        if self.resumed is not None:
            for tuner in self.tuners:
                tunerkit.load_state(tuner.model, folder_of(self.resumed, self.tuners, tuner), adapter=tuner.name)

    def end(self) -> None:
        for tuner in self.tuners:
            detach(tuner)

    def save(self, checkpoint: Path) -> None:
        for tuner in self.tuners:
            folder = folder_of(checkpoint, self.tuners, tuner)
            save_tuner(tuner, folder)
            tunerkit.save_state(tuner.model, folder, adapter=tuner.name)

    def resume(self, checkpoint: Path, step: int) -> None:
        self.resumed, self.loop.step = checkpoint, step
        for tuner in self.tuners:
            restore_(tuner, folder_of(checkpoint, self.tuners, tuner))


class DrivingPlugin:
    @tunerkit.hookimpl
    def tunerkit_attach(self, tuners: Sequence[Tuner], candidate: object, data_parallel: bool | None) -> bool | None:
        if not isinstance(candidate, Loop):
            return None
        for tuner in tuners:
            if is_attached(tuner):
                raise tunerkit.errors.StepError(f"adapter {tuner.name!r} is attached already")
        candidate.driving = Driving(candidate, tuners, data_parallel)
        return True


DRIVING = DrivingPlugin()


class Claiming:
    """Answers for whatever is attached."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    @tunerkit.hookimpl(tryfirst=True)
    def tunerkit_attach(self) -> object:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


_toys = registering(LowRankPlugin(), DRIVING)


def wrapped() -> Any:
    return tunerkit.wrap(net(), "toy-low-rank", TARGETS, seed=0)


def test_a_trainer_that_a_plugin_knows_drives_the_adapter() -> None:
    """Law: what it trains is counted, and an optimizer is attached as if there were no plugin."""
    model = wrapped()
    loop = Loop(model, 3)
    tunerkit.attach(model, loop)
    assert tunerkit.tuner(model).steps == 0
    loop.run()
    tuner = tunerkit.tuner(model)
    assert (tuner.steps, tuner.total_steps) == (3, 3)
    other = wrapped()
    tunerkit.attach(other, torch.optim.SGD(trainable(other), lr=0.1), total_steps=1)
    assert tunerkit.tuner(other).total_steps == 1


def driven(steps: int, names: Sequence[str], **options: Any) -> tuple[Any, Any]:
    """A model with these adapters, and a trainer that drives them."""
    model: Any = net()
    for seed, name in enumerate(names):
        tunerkit.wrap(model, "toy-low-rank", TARGETS, adapter=name, seed=seed)
    tunerkit.activate(model, names)
    loop = Loop(model, steps, **options)
    tunerkit.attach(model, loop)
    return model, loop


@pytest.mark.parametrize("names", [["default"], ["one", "other"]])
def test_a_trainer_s_checkpoint_continues_the_training(names: list[str], tmp_path: Path) -> None:
    """Law: stopped after two steps and resumed in a new model, the weights are those of the whole training."""
    whole, loop = driven(4, names)
    loop.run()
    _, loop = driven(2, names)
    loop.run()
    loop.driving.save(tmp_path)
    resumed, loop = driven(4, names)
    loop.driving.resume(tmp_path, 2)
    loop.run()
    assert all(torch.equal(one, other) for one, other in zip(trainable(resumed), trainable(whole), strict=True))
    assert [tuner.steps for tuner in tunerkit.adapters(resumed).values()] == [4] * len(names)


def test_steps_follow_the_trainer_s_clock_until_it_ends() -> None:
    """A step that the trainer skips counts; while it trains nobody else attaches, and afterwards anybody may."""
    model, loop = driven(4, ["default"], skipped=frozenset({1}))
    loop.driving.begin(optimizer := torch.optim.SGD(trainable(model), lr=0.1))
    with pytest.raises(tunerkit.errors.StepError, match="adapter 'default' is attached already") as caught:
        tunerkit.attach(model, Loop(model, 1))
    assert any("tunerkit_attach of plugin 'DrivingPlugin'" in note for note in caught.value.__notes__)
    assert optimizer_of(tunerkit.tuner(model)) is optimizer
    loop.driving.end()
    loop.run()
    assert tunerkit.tuner(model).steps == 4
    tunerkit.attach(model, torch.optim.SGD(trainable(model), lr=0.1), total_steps=1)


def test_a_plugin_that_says_false_is_not_the_last_to_be_asked() -> None:
    """It means the same as None: not mine."""

    class Careless:
        @tunerkit.hookimpl(tryfirst=True)
        def tunerkit_attach(self) -> bool:
            return False

    model = wrapped()
    tunerkit.unregister(DRIVING)
    with registered(Careless(), DRIVING):
        tunerkit.attach(model, loop := Loop(model, 3))
    tunerkit.register(DRIVING)
    assert loop.driving is not None


@pytest.mark.parametrize("answer", [True, "yes", SystemExit(0)])
def test_an_optimizer_of_torch_is_cores_own(answer: Any) -> None:
    """No plugin is asked about it: one that claims everything would train nothing, in silence."""
    with registered(Claiming(answer)):
        model = wrapped()
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        tunerkit.attach(model, optimizer, total_steps=1)
    assert optimizer_of(tunerkit.tuner(model)) is optimizer


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("yes", r"returned 'yes'; it must return bool \| None"),
        (1, r"returned 1; it must return bool \| None"),
        (SystemExit(0), "raised SystemExit"),
    ],
)
def test_a_wrong_answer_about_a_trainer_names_the_plugin(answer: Any, words: str) -> None:
    """So does what would end the program; and both say how to run without the plugin."""
    with (
        registered(Claiming(answer)),
        pytest.raises(tunerkit.errors.PluginError, match=f"tunerkit_attach of plugin 'Claiming'.*{words}") as caught,
    ):
        tunerkit.attach(model := wrapped(), Loop(model, 1))
    assert "to run without it, pass it to tunerkit.unregister" in str(caught.value)
