"""`speed_up`: what it sets on a Trainer, what it says, and that a training is resumed bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="the trainers are TRL's")
pytest.importorskip("datasets", reason="TRL takes its data from it")
import datasets
from transformers import Trainer

import tunerkit
from plugins.transformers.tests.test_head_weights import ROWS, adapted, trainer_of
from tests.support.trainer_toys import Regression, RegressionRows, arguments
from tunerkit_transformers import memory_plan
from tunerkit_transformers.savings import Saving, speed_up

pytestmark = [
    pytest.mark.usefixtures("toys"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]
UNEVEN = {"input_ids": [[2] * (3 + 5 * number % 11) for number in range(24)]}


def sped_up(folder: Path, patch: pytest.MonkeyPatch, *, keep: tuple[str, ...] = (), **more: Any) -> tuple[Any, Any]:
    patch.setitem(ROWS, "SFT", UNEVEN)
    memory = more.pop("memory", None)
    trainer = trainer_of("SFT", adapted("adapter"), folder, **more)
    return trainer, {each.name: each for each in speed_up(trainer, keep=keep, memory=memory)}


def test_what_trl_wastes_is_switched_off_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpointing, batches at random, and logits at all positions; each with its reason in one line."""
    trainer, found = sped_up(tmp_path, monkeypatch)
    assert [each.changed for each in found.values()] == [True] * 3
    assert not trainer.args.gradient_checkpointing
    assert str(found["gradient checkpointing"]).startswith("gradient checkpointing: off (a step takes about 0.06 GiB")
    assert "tokens are computed for each real one, and" in str(found["batches"])
    batches = [
        (batch["input_ids"].shape[1], batch["attention_mask"].sum(1).min()) for batch in trainer.get_train_dataloader()
    ]
    assert sum(int(width - least) for width, least in batches) < 24
    assert str(found["loss"]) == (
        "loss: at the learned positions (on a CPU, TRL's own computes logits at every position)"
    )


def test_each_saving_can_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the names that the arguments have, and ``loss``."""
    keep = ("gradient_checkpointing", "train_sampling_strategy", "loss")
    trainer, found = sped_up(tmp_path, monkeypatch, keep=keep)
    assert [*map(str, found.values())] == [
        "gradient checkpointing: on (as asked)", "batches: random (as asked)", "loss: the trainer's own (as asked)"
    ]  # fmt: skip
    assert trainer.args.gradient_checkpointing
    assert not any(each.changed for each in found.values())


def test_activations_that_do_not_fit_are_recomputed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the form that needs no gradient of the input; the memory may be stated."""
    trainer, found = sped_up(tmp_path, monkeypatch, gradient_checkpointing=False, memory=1)
    saving = found["gradient checkpointing"]
    assert (saving.chosen, saving.changed) == ("on", True)
    assert "and 0.00 GiB are free" in saving.why
    assert trainer.args.gradient_checkpointing
    assert trainer.args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    trainer.train()
    assert trainer.model.is_gradient_checkpointing


def test_rows_count_as_long_as_they_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL cuts pairs only as it makes a batch of them."""
    long = {"prompt": ["w1"] * 8, "chosen": ["w2 " * 30] * 8, "rejected": ["w3"] * 8}
    monkeypatch.setitem(ROWS, "DPO", long)
    seen: list[int] = []

    def planned(model: Any, *, tokens: int, **more: Any) -> None:
        seen.append(tokens)

    monkeypatch.setattr(memory_plan, "plan", planned)
    for most in (8, None):
        speed_up(trainer_of("DPO", adapted("adapter"), tmp_path, max_length=most))
    assert seen[0] == 8 < seen[-1]


def test_a_step_that_cannot_be_estimated_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as of a forward that needs other inputs: no training ends by its estimate."""

    def failing(*arguments: Any) -> Any:
        raise TypeError("forward() needs an image")

    monkeypatch.setattr(memory_plan, "kept_by", failing)
    trainer, found = sped_up(tmp_path, monkeypatch)
    assert str(found["gradient checkpointing"]) == "gradient checkpointing: on (a step cannot be estimated)"
    assert trainer.args.gradient_checkpointing
    trainer.train()


def test_logits_are_planned_where_they_are_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At learned positions two copies of three that other losses keep; at all of them if the loss stays."""
    rows = {"input_ids": [[2] * 12] * 8, "labels": [[-100] * 9 + [2] * 3] * 8}
    monkeypatch.setitem(ROWS, "SFT", rows)
    seen: list[int] = []
    monkeypatch.setattr(memory_plan, "plan", lambda model, *, logits, **more: seen.append(logits))
    for keep in ((), ("loss",)):
        trainer = trainer_of("SFT", adapted("adapter"), tmp_path, dataset_kwargs={"skip_prepare_dataset": True})
        speed_up(trainer, keep=keep)
    size = trainer.args.per_device_train_batch_size
    assert seen == [size * 3 * 2 // 3, size * 12]


def test_a_trainer_of_something_else_is_left_alone(tmp_path: Path) -> None:
    """Nothing is known of its rows, and its loss is its own."""
    trainer = Trainer(Regression(), arguments(tmp_path), train_dataset=RegressionRows())
    sampler = trainer._get_train_sampler
    found = speed_up(trainer)
    assert found == (
        Saving("gradient checkpointing", "off", False, "the rows' lengths are not known"),
        Saving("batches", "random", False, "unknown lengths"),
        Saving("loss", "the trainer's own", False, "Trainer is neither TRL's SFTTrainer nor its DPOTrainer"),
    )
    assert trainer._get_train_sampler == sampler


def test_a_training_is_resumed_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the middle of its second epoch, whose batches are others than the first one's."""
    options: dict[str, Any] = {"max_steps": -1, "num_train_epochs": 3, "save_strategy": "steps", "save_steps": 4}
    whole, _ = sped_up(tmp_path / "run", monkeypatch, **options)
    seen: list[Any] = []
    step = whole.training_step

    def noted(model: Any, inputs: Any, *rest: Any) -> Any:
        seen.append(inputs["input_ids"].shape[1])
        return step(model, inputs, *rest)

    whole.training_step = noted
    whole.train()
    assert seen[:6] != seen[6:12]
    again, _ = sped_up(tmp_path / "run", monkeypatch, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-8"))
    for one, other in zip(
        tunerkit.tuner(whole.model).parameters(), tunerkit.tuner(again.model).parameters(), strict=True
    ):
        assert torch.equal(one, other)


def test_preferences_are_grouped_by_their_longer_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rows have no ``input_ids``."""
    ends = [" ".join(["w2"] * (1 + number % 4)) for number in range(8)]
    monkeypatch.setitem(ROWS, "DPO", {"prompt": ["w1 w2"] * 8, "chosen": ends, "rejected": ["w3"] * 8})
    trainer = trainer_of("DPO", adapted("adapter"), tmp_path)
    assert isinstance(trainer.train_dataset, datasets.Dataset)
    assert [each.changed for each in speed_up(trainer)] == [True] * 3
    trainer.train()
