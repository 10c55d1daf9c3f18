"""Parameter groups: the learning rates and weight decays that a method asks for, in a loop and under a Trainer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tunerkit
from tests.support.resumed_loop import assert_resumes
from tunerkit_testing.registering import registered
from tunerkit_testing.small import net, train, trainable
from tunerkit_testing.toy_methods import LowRankConfig, LowRankPlugin

pytestmark = pytest.mark.core_only

TARGETS = {"targets": ["0", "2"]}


class PlusPlugin(LowRankPlugin):
    """``toy-plus``: trains ``b`` 16 times as fast as ``a``, as LoRA+ does, and without weight decay."""

    @tunerkit.hookimpl
    def tunerkit_methods(self) -> list[tunerkit.Method]:
        return [tunerkit.Method("toy-plus", config=LowRankConfig)]

    @tunerkit.hookimpl
    def tunerkit_param_groups(self, tuner: tunerkit.Tuner) -> list[tunerkit.ParamGroup]:
        fast = (parameter for name, parameter in tuner.named_parameters() if name.endswith(".b"))
        return [tunerkit.ParamGroup(fast, lr_scale=16.0, weight_decay=0.0)]


@pytest.fixture(autouse=True, scope="module")
def _toys() -> Iterator[None]:
    with registered(PlusPlugin(), LowRankPlugin()):
        yield


def wrapped(method: str = "toy-plus", **config: Any) -> nn.Module:
    return tunerkit.wrap(net(), method, {**TARGETS, **config}, seed=0)


def ids(group: dict[str, Any]) -> set[int]:
    return {id(parameter) for parameter in group["params"]}


def named(model: nn.Module, *ends: str) -> set[int]:
    return {id(p) for name, p in model.named_parameters() if name.endswith(ends) and p.requires_grad}


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
    with pytest.raises(tunerkit.StepError, match=r"every adapter is frozen.*tunerkit\.thaw"):
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
    with pytest.raises(tunerkit.StepError, match="expected a finite number >= 0 as lr, got"):
        tunerkit.param_groups(wrapped(), lr=value)


@pytest.mark.parametrize("value", ["0", -1.0, float("nan"), False])
def test_a_wrong_weight_decay_is_refused(value: Any) -> None:
    """None alone leaves it to the optimizer."""
    with pytest.raises(tunerkit.StepError, match="expected a finite number >= 0 as weight_decay, got"):
        tunerkit.param_groups(wrapped(), lr=1.0, weight_decay=value)


def test_a_model_without_adapters_has_no_groups() -> None:
    """The error says what to call first."""
    with pytest.raises(tunerkit.AdapterError, match="has no adapter"):
        tunerkit.param_groups(net(), lr=1.0)


class Answering(LowRankPlugin):
    """Answers `tunerkit_param_groups` with what a function makes of the tuner."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    @tunerkit.hookimpl
    def tunerkit_methods(self) -> list[tunerkit.Method]:
        return [tunerkit.Method("toy-answering", config=LowRankConfig)]

    @tunerkit.hookimpl
    def tunerkit_param_groups(self, tuner: tunerkit.Tuner) -> Any:
        return self.answer(list(tuner.parameters()))


Group: Any = tunerkit.ParamGroup


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda own: 3, "returned an int"),
        (lambda own: [own], "a list with a list"),
        (lambda own: [Group(own, lr_scale=-1)], "lr_scale=-1"),
        (lambda own: [Group(own, lr_scale="fast")], "lr_scale='fast'"),
        (lambda own: [Group(own, weight_decay=float("inf"))], "weight_decay=inf"),
        (lambda own: [Group([nn.Parameter(torch.ones(1))])], "not the adapter's"),
        (lambda own: [Group(own[:1]), Group(own)], "in two groups, or twice"),
        (lambda own: [Group(own[0])], "not the adapter's"),
    ],
)
def test_a_wrong_answer_of_the_hook_names_the_plugin(answer: Any, words: str) -> None:
    """And the adapter, and what it has to return."""
    with registered(Answering(answer)):
        model = wrapped("toy-answering")
        expected = f"tunerkit_param_groups.*'toy-answering'.*{words}.*for adapter 'default'"
        with pytest.raises(tunerkit.PluginError, match=expected):
            tunerkit.param_groups(model, lr=1.0)


# Under a Trainer


def trainer_of(folder: Path, **options: Any) -> tuple[nn.Module, Any]:
    pytest.importorskip("transformers", reason="the Trainer is transformers'")
    from transformers import Trainer

    from tunerkit_testing.trainer_toys import Regression, RegressionRows, arguments

    model = tunerkit.wrap(Regression(), "toy-plus", {"targets": ["first", "second"], "bias": "adapters"}, seed=0)
    defaults = {"learning_rate": 1e-2, "weight_decay": 0.1, "max_steps": 4, "lr_scheduler_type": "linear"}
    trainer = Trainer(model, arguments(folder, **(defaults | options)), train_dataset=RegressionRows())
    tunerkit.attach(model, trainer)
    return model, trainer


def test_an_attached_trainer_builds_the_same_groups(tmp_path: Path) -> None:
    """The scheduler scales each group's own rate, and each parameter is in the optimizer once."""
    model, trainer = trainer_of(tmp_path)
    trainer.create_optimizer_and_scheduler(4)
    groups = trainer.optimizer.param_groups
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in trainable(model))
    fast = [group for group in groups if group["initial_lr"] == 0.16]
    assert set().union(*map(ids, fast)) == named(model, "adapter.b")
    assert all(group["weight_decay"] == 0.0 for group in fast)
    trainer.train()
    assert {(group["initial_lr"], group["lr"]) for group in trainer.optimizer.param_groups} == {
        (0.01, 0.0),
        (0.16, 0.0),
    }
    assert trainer.state.global_step == 4


def test_its_rates_follow_the_schedule_at_each_step(tmp_path: Path) -> None:
    """After half of the steps, both rates have halved."""
    from transformers import TrainerCallback

    rates: list[set[float]] = []

    class Watching(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            rates.append({round(group["lr"], 6) for group in kwargs["optimizer"].param_groups})

    _, trainer = trainer_of(tmp_path)
    trainer.add_callback(Watching())
    trainer.train()
    assert rates[1] == {0.005, 0.08}


def test_a_trainer_without_wishes_keeps_its_own_groups(tmp_path: Path) -> None:
    """Also an empty one, which a checkpoint from before has too: its optimizer state must still fit."""
    from transformers import Trainer

    from tunerkit_testing.trainer_toys import Regression, RegressionRows, arguments

    counts = []
    for attaching in (False, True):
        model = tunerkit.wrap(Regression(), "toy-low-rank", {"targets": ["first"]})
        trainer = Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=RegressionRows())
        if attaching:
            tunerkit.attach(model, trainer)
        groups = trainer.create_optimizer().param_groups
        counts.append([len(group["params"]) for group in groups])
    assert counts[0] == counts[1]
    assert 0 in counts[0]


def test_a_resumed_trainer_has_the_groups_again(tmp_path: Path) -> None:
    """Interrupted after two of four steps and resumed: the same weights, bit for bit."""
    whole, trainer = trainer_of(tmp_path / "whole", save_strategy="steps", save_steps=2)
    trainer.train()
    resumed, trainer = trainer_of(tmp_path / "whole", save_strategy="no")
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_an_optimizer_that_was_given_to_the_trainer_stays_as_it_is(tmp_path: Path) -> None:
    """Whoever builds one has chosen its groups."""
    from transformers import Trainer

    from tunerkit_testing.trainer_toys import Regression, RegressionRows, arguments

    model = tunerkit.wrap(Regression(), "toy-plus", {"targets": ["first"]})
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    options = arguments(tmp_path, max_steps=1)
    trainer = Trainer(model, options, train_dataset=RegressionRows(), optimizers=(optimizer, scheduler))
    tunerkit.attach(model, trainer)
    trainer.train()
    assert len(optimizer.param_groups) == 1


def test_a_resumed_loop_has_the_groups_again(tmp_path: Path) -> None:
    """The optimizer's state fits groups that were made anew."""

    def started(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(tunerkit.param_groups(model, lr=1e-2))

    assert_resumes(wrapped, started, tmp_path, steps=3, stopped=2)
