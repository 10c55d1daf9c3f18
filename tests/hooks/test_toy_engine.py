"""An engine of an unknown library: a plugin brings it without a line in core, and with the public names alone."""

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import pytest
import torch
from torch import nn

import tunerkit
from tests.support.toy_growing import GrowingPlugin
from tests.support.toys import registering
from tunerkit.plugin import Engine, Tuner, optimizer_of, resize_obstacle
from tunerkit.plugin.engines import Removable
from tunerkit_testing.registering import registered
from tunerkit_testing.small import X, net, trainable
from tunerkit_testing.toy_methods import LowRankPlugin

TARGETS = {"targets": ["0", "2"]}

# --- The engine: several models in one process, each with a part of the batch ---


class Side(Engine):
    """One model of a training of several: they start alike, and step by the mean of their gradients."""

    name, is_shared = "several models of one process", True
    fixed_shapes = "the other models would keep theirs"

    def __init__(self, others: list[Tuner]) -> None:
        self.all = others

    def begin_(self, adapters: Sequence[Tuner], optimizer: Any) -> Mapping[str, tuple[Removable, ...]]:
        for tuner in adapters:
            if any(other.method != tuner.method for other in self.all):
                raise tunerkit.errors.StepError("the models of this training have adapters of other methods")
            for one, other in zip(_parameters(tuner), _parameters((*self.all, tuner)[0]), strict=True):
                one.data.copy_(other)
            self.all.append(tuner)
        return {}

    def before_step_(self, optimizer: Any) -> None:
        for same in zip(*map(_parameters, self.all), strict=True):
            mean = torch.stack([each.grad for each in same if each.grad is not None]).mean(0)
            for each in same:
                each.grad = mean.clone()


def _parameters(tuner: Tuner) -> list[nn.Parameter]:
    return [p for p in tuner.parameters() if p.requires_grad]


@attrs.frozen
class Several:
    """What a user of this library attaches: an optimizer of one of the models, and what they have in common."""

    optimizer: torch.optim.Optimizer
    training: list[Tuner]


class SeveralPlugin:
    @tunerkit.hookimpl
    def tunerkit_engine(self, candidate: object) -> tuple[Engine, object] | None:
        return (Side(candidate.training), candidate.optimizer) if isinstance(candidate, Several) else None


# --- What it must do ---


_toys = registering(LowRankPlugin(), GrowingPlugin(), SeveralPlugin())


def trained(models: Sequence[Any], attach: Callable[[Any, torch.optim.Optimizer], None]) -> Any:
    """The first of the models after three steps, each on a part of the rows."""
    optimizers = [torch.optim.SGD(trainable(model), lr=0.1) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        attach(model, optimizer)
    for _ in range(3):
        for model, rows in zip(models, X.chunk(len(models)), strict=True):
            model(rows).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    return models[0]


def wrapped(seed: int, method: str = "toy-low-rank") -> Any:
    return tunerkit.wrap(net(), method, TARGETS, seed=seed)


def test_two_models_train_as_one_on_the_whole_batch() -> None:
    """Law: the mean over parts is the gradient of the batch, whatever the second model began with."""
    training: list[Tuner] = []
    several = trained([wrapped(0), wrapped(1)], lambda m, o: tunerkit.attach(m, Several(o, training), total_steps=3))
    alone = trained([wrapped(0)], lambda m, o: tunerkit.attach(m, o, total_steps=3))
    assert tunerkit.tuner(several).steps == 3
    assert tunerkit.tuner(several).engine.name == "several models of one process"
    for one, other in zip(trainable(several), trainable(alone), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_what_the_engine_says_holds_for_methods_and_its_errors_reach_the_user() -> None:
    """A growing method gets the reason for fixed shapes; models that differ are rejected, and nothing is attached."""
    training: list[Tuner] = []
    model, other = wrapped(0), wrapped(0, "toy-growing")
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    tunerkit.attach(model, Several(optimizer, training), total_steps=3)
    assert "the other models would keep theirs" in str(resize_obstacle(trainable(model), optimizer))
    with pytest.raises(tunerkit.errors.StepError, match="adapters of other methods"):
        tunerkit.attach(other, Several(torch.optim.SGD(trainable(other), lr=0.1), training), total_steps=3)
    assert optimizer_of(tunerkit.tuner(other)) is None


class Counted(Engine):
    """One whose processes train adapters of their own, which is the default."""

    def __init__(self) -> None:
        self.steps = 0

    def before_step_(self, optimizer: Any) -> None:
        self.steps += 1


def test_an_engine_of_one_process_sees_each_step() -> None:
    """Also if it shares nothing."""
    counted, plugin = Counted(), types.ModuleType("counting")
    plugin.tunerkit_engine = tunerkit.hookimpl(  # type: ignore[attr-defined]
        lambda candidate: (counted, candidate) if isinstance(candidate, torch.optim.SGD) else None
    )
    with registered(plugin):
        model = tunerkit.wrap(net(), "toy-low-rank", TARGETS)
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        tunerkit.attach(model, optimizer)
        for _ in range(3):
            model(X).square().mean().backward()
            optimizer.step()
    assert counted.steps == 3
    assert tunerkit.tuner(model).engine is counted
