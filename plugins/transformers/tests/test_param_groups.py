"""A Trainer's optimizer has the learning rates and weight decays that a method asks for."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

import tunerkit
from tests.support.toy_plus import PlusPlugin, ids, named
from tests.support.trainer_toys import Regression, RegressionRows, arguments
from tunerkit_testing.registering import registered
from tunerkit_testing.small import trainable
from tunerkit_testing.toy_methods import LowRankPlugin


@pytest.fixture(autouse=True, scope="module")
def _toys() -> Iterator[None]:
    with registered(PlusPlugin(), LowRankPlugin()):
        yield


def trainer_of(folder: Path, **options: Any) -> tuple[nn.Module, Any]:
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
    model = tunerkit.wrap(Regression(), "toy-plus", {"targets": ["first"]})
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    options = arguments(tmp_path, max_steps=1)
    trainer = Trainer(model, options, train_dataset=RegressionRows(), optimizers=(optimizer, scheduler))
    tunerkit.attach(model, trainer)
    trainer.train()
    assert len(optimizer.param_groups) == 1
