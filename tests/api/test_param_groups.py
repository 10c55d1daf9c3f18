"""Parameter groups: the learning rates and weight decays that a method asks for."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tunerkit
from tests.support.resumed_loop import assert_resumes
from tests.support.toy_plus import PlusPlugin, ids, named
from tunerkit.plugin import Method, ParamGroup, Tuner
from tunerkit_testing.registering import registered
from tunerkit_testing.small import net, train, trainable
from tunerkit_testing.toy_methods import LowRankConfig, LowRankPlugin

TARGETS = {"targets": ["0", "2"]}


@pytest.fixture(autouse=True, scope="module")
def _toys() -> Iterator[None]:
    with registered(PlusPlugin(), LowRankPlugin()):
        yield


def wrapped(method: str = "toy-plus", **config: Any) -> nn.Module:
    return tunerkit.wrap(net(), method, {**TARGETS, **config}, seed=0)


def test_every_trained_parameter_is_in_one_group_with_what_its_method_asks_for() -> None:
    """Heads and biases have the plain settings; an optimizer takes the groups as they are."""
    model = wrapped(train_modules=["4"], bias="adapters")
    plain, fast = tunerkit.param_groups(model, lr=1e-3, weight_decay=0.1)
    assert ids(plain) | ids(fast) == {id(parameter) for parameter in trainable(model)}
    assert len(plain["params"]) + len(fast["params"]) == len(trainable(model))
    assert ids(fast) == named(model, "adapter.b")
    assert (plain["lr"], fast["lr"]) == (1e-3, 1.6e-2)
    assert (plain["weight_decay"], fast["weight_decay"]) == (0.1, 0.0)
    optimizer = torch.optim.AdamW([plain, fast])
    tunerkit.attach(model, optimizer, total_steps=3)
    losses = train(model, optimizer, 3)
    assert losses[-1] < losses[0]


def test_a_method_that_asks_for_nothing_gives_one_group() -> None:
    """Weight decay is left to the optimizer unless it is given."""
    model = wrapped("toy-low-rank")
    (group,) = tunerkit.param_groups(model, lr=0.5)
    assert set(group) == {"params", "lr"}
    assert [id(p) for p in group["params"]] == [id(p) for p in trainable(model)]


def test_several_adapters_and_frozen_ones() -> None:
    """Each method is asked about its own adapter, and what is frozen is in no group."""
    model = tunerkit.wrap(wrapped(), "toy-low-rank", TARGETS, adapter="plain")
    plain, fast = tunerkit.param_groups(model, lr=1.0)
    assert ids(fast) == named(model, "default.adapter.b")
    assert ids(plain) == named(model, "adapter.a", "plain.adapter.b")
    tunerkit.freeze(model, "default")
    (group,) = tunerkit.param_groups(model, lr=1.0)
    assert ids(group) == named(model, "plain.adapter.a", "plain.adapter.b")
    tunerkit.freeze(model, "plain")
    with pytest.raises(tunerkit.errors.StepError, match=r"every adapter is frozen.*tunerkit\.thaw"):
        tunerkit.param_groups(model, lr=1.0)


def test_shared_and_fixed_parameters_are_in_one_group_or_none() -> None:
    """What is shared is listed once; what is fixed is not trained."""
    from tests.support.toy_shared import SharedPlugin

    with registered(SharedPlugin()):
        model = tunerkit.wrap(net(), "toy-shared", TARGETS)
        (group,) = tunerkit.param_groups(model, lr=1.0)
        assert ids(group) == named(model, "adapter.v", "adapter.d")


@pytest.mark.parametrize("value", ["1e-3", -1.0, float("nan"), None, True])
def test_a_wrong_learning_rate_is_refused(value: Any) -> None:
    """Before anything is asked of a plugin."""
    with pytest.raises(tunerkit.errors.StepError, match="expected a finite number >= 0 as lr, got"):
        tunerkit.param_groups(wrapped(), lr=value)


@pytest.mark.parametrize("value", ["0", -1.0, float("nan"), False])
def test_a_wrong_weight_decay_is_refused(value: Any) -> None:
    """None alone leaves it to the optimizer."""
    with pytest.raises(tunerkit.errors.StepError, match="expected a finite number >= 0 as weight_decay, got"):
        tunerkit.param_groups(wrapped(), lr=1.0, weight_decay=value)


def test_a_model_without_adapters_has_no_groups() -> None:
    """The error says what to call first."""
    with pytest.raises(tunerkit.errors.AdapterError, match="has no adapter"):
        tunerkit.param_groups(net(), lr=1.0)


class Answering(LowRankPlugin):
    """Answers `tunerkit_param_groups` with what a function makes of the tuner."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    @tunerkit.hookimpl
    def tunerkit_methods(self) -> list[Method]:
        return [Method("toy-answering", config=LowRankConfig)]

    @tunerkit.hookimpl
    def tunerkit_param_groups(self, tuner: Tuner) -> Any:
        return self.answer(list(tuner.parameters()))


Group: Any = ParamGroup


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda own: 3, "returned 3"),
        (lambda own: [own], r"with \[.*\] at \[0\]"),
        (lambda own: [Group(own, lr_scale=-1)], "lr_scale=-1"),
        (lambda own: [Group(own, lr_scale="fast")], r"'fast' at \[0\]\.lr_scale"),
        (lambda own: [Group(own, weight_decay=float("inf"))], "weight_decay=inf"),
        (lambda own: [Group([nn.Parameter(torch.ones(1))])], "not the adapter's"),
        (lambda own: [Group(own[:1]), Group(own)], "in two groups, or twice"),
        (lambda own: [Group(own[0])], r"at \[0\]\.parameters\[0\]"),
    ],
)
def test_a_wrong_answer_of_the_hook_names_the_plugin(answer: Any, words: str) -> None:
    """And the adapter, and what it has to return."""
    with registered(Answering(answer)):
        model = wrapped("toy-answering")
        expected = f"tunerkit_param_groups.*'toy-answering'.*{words}.*for adapter 'default'"
        with pytest.raises(tunerkit.errors.PluginError, match=expected):
            tunerkit.param_groups(model, lr=1.0)


def test_a_resumed_loop_has_the_groups_again(tmp_path: Path) -> None:
    """The optimizer's state fits groups that were made anew."""

    def started(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(tunerkit.param_groups(model, lr=1e-2))

    assert_resumes(wrapped, started, tmp_path, steps=3, stopped=2)
