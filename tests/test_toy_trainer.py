"""A trainer of a library that nobody knows: a plugin attaches to it without a line in core."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tunerkit
from tunerkit_testing.registering import registered
from tunerkit_testing.small import X, net, trainable
from tunerkit_testing.toy_methods import LowRankPlugin

TARGETS = {"targets": ["0", "2"]}


class Loop:
    """A trainer: it makes its optimizer in `run`, and tells whoever listens."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.model, self.steps = model, steps
        self.listening: list[Callable[[torch.optim.Optimizer], None]] = []

    def run(self) -> None:
        optimizer = torch.optim.SGD(trainable(self.model), lr=0.1)
        for listen in self.listening:
            listen(optimizer)
        for _ in range(self.steps):
            self.model(X).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()


class LoopPlugin:
    @tunerkit.hookimpl
    def tunerkit_attach(
        self, tuners: Sequence[tunerkit.Tuner], candidate: object, total_steps: int | None
    ) -> bool | None:
        if not isinstance(candidate, Loop):
            return None
        if total_steps not in (None, candidate.steps):
            raise tunerkit.StepError(f"the loop takes {candidate.steps} steps, not {total_steps}")
        for tuner in tuners:
            attach = partial(tunerkit.attach, candidate.model, total_steps=candidate.steps, adapter=tuner.name)
            candidate.listening.append(attach)
        return True


@pytest.fixture(autouse=True)
def _toys() -> Iterator[None]:
    with registered(LowRankPlugin(), LoopPlugin()):
        yield


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


def test_what_the_plugin_raises_reaches_the_user_and_names_it() -> None:
    """It is no reason to go on with somebody else's way of attaching."""
    model = wrapped()
    with pytest.raises(tunerkit.StepError, match="the loop takes 3 steps, not 5") as caught:
        tunerkit.attach(model, Loop(model, 3), total_steps=5)
    assert any("tunerkit_attach of plugin 'LoopPlugin'" in note for note in caught.value.__notes__)


def test_a_trainer_that_no_plugin_knows_is_refused_with_the_extra_that_does() -> None:
    """By the library of its class; one of a library that no extra serves is told what to pass instead."""
    model = wrapped()
    trainer = type("SFTTrainer", (), {"__module__": "trl.trainer.sft_trainer"})()
    with pytest.raises(tunerkit.StepError, match=r'tunerkit-transformers knows it.*"tunerkit\[transformers\]"'):
        tunerkit.attach(model, trainer)
    with pytest.raises(tunerkit.StepError, match="got object; pass the optimizer that steps the adapter"):
        tunerkit.attach(model, object())


@pytest.mark.skipif(find_spec("tunerkit_transformers") is not None, reason="tunerkit-transformers says what it is")
def test_a_folder_that_no_plugin_opens_is_refused_with_the_extra_that_does(tmp_path: Path) -> None:
    """In-process plugins are asked too."""
    with pytest.raises(tunerkit.FileError, match=r"no installed plugin knows this folder.*tunerkit\[transformers\]"):
        tunerkit.from_folder(tmp_path)

    class Opening:
        @tunerkit.hookimpl
        def tunerkit_open_run(self, path: object, base: str | None) -> tuple[nn.Module, object]:
            return net(), f"{base} of {path}"

    with registered(Opening()):
        assert tunerkit.from_folder(tmp_path, "mine")[1] == f"mine of {tmp_path}"
