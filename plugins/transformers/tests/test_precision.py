"""A Trainer's precision: autocast is around the model while it trains, and only then."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

import tunerkit
from tests.support.trainer_toys import Regression, RegressionRows, arguments
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import LowRankPlugin

ROWS = RegressionRows()


class Dtypes:
    """Notes the dtype that the first layer computes in, while training and in evaluations."""

    def __init__(self, model: Any) -> None:
        self.seen: list[torch.dtype] = []
        model.first.register_forward_hook(lambda module, args, output: self.seen.append(output.dtype))


def trainer_of(model: nn.Module, folder: Path, **options: Any) -> Trainer:
    given = {"max_steps": 3, "bf16": True, "eval_strategy": "no", **options}
    trainer = Trainer(model, arguments(folder, **given), train_dataset=ROWS, eval_dataset=ROWS)
    tunerkit.attach(model, trainer)
    return trainer


@pytest.fixture
def model() -> Any:
    with registered(LowRankPlugin()):
        yield tunerkit.wrap(Regression(), "toy-low-rank", {"targets": ["first", "second"]})


def test_training_leaves_the_models_own_forward(model: Any, tmp_path: Path) -> None:
    """Not accelerate's autocast: what was trained computes as the same adapter on a base that was loaded."""
    noted = Dtypes(model)
    trainer_of(model, tmp_path).train()
    assert set(noted.seen) == {torch.bfloat16}
    assert not {"forward", "_original_forward"} & {*vars(model)}
    noted.seen.clear()
    model(**{name: value[None] for name, value in ROWS[0].items()})
    assert noted.seen == [torch.float32]


def test_evaluations_compute_in_the_trainers_precision_whenever_they_run(model: Any, tmp_path: Path) -> None:
    """Before, while and after it trains; and leave the forward as it was."""
    noted = Dtypes(model)
    trainer = trainer_of(model, tmp_path, eval_strategy="steps", eval_steps=3)
    before = trainer.evaluate()["eval_loss"]
    assert not {"forward", "_original_forward"} & {*vars(model)}
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert set(noted.seen) == {torch.bfloat16}
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert logged[-1] == after != before


def test_a_forward_that_the_user_put_on_the_model_stays(model: Any, tmp_path: Path) -> None:
    """It was there before the training, and is there after it."""
    own = model.forward
    calls: list[int] = []

    @functools.wraps(own)  # a Trainer asks for the names of the arguments
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    model.forward = counted
    trainer_of(model, tmp_path).train()
    assert len(calls) == 3
    assert model.forward is counted
    assert "_original_forward" not in vars(model)


def test_an_exception_in_training_leaves_the_models_own_forward_too(model: Any, tmp_path: Path) -> None:
    """Ctrl-C in a notebook is one."""

    class Fails(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    trainer = trainer_of(model, tmp_path)
    trainer.add_callback(Fails())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not {"forward", "_original_forward"} & {*vars(model)}


def test_an_evaluation_before_attaching_leaves_nothing_on_the_model_either(model: Any, tmp_path: Path) -> None:
    """It has put autocast on it, which nobody would take off any more."""
    noted = Dtypes(model)
    trainer = Trainer(model, arguments(tmp_path, max_steps=3, bf16=True), train_dataset=ROWS, eval_dataset=ROWS)
    trainer.evaluate()
    tunerkit.attach(model, trainer)
    trainer.train()
    assert not {"forward", "_original_forward", "_is_accelerate_prepared"} & {*vars(model)}
    assert set(noted.seen) == {torch.bfloat16}
    noted.seen.clear()
    trainer_of(model, tmp_path, bf16=False).train()
    assert set(noted.seen) == {torch.float32}


def test_metrics_get_the_same_logits_while_and_after_it_trains(model: Any, tmp_path: Path) -> None:
    """In fp32, which numpy takes: accelerate converts what autocast computes."""
    seen: list[torch.dtype] = []

    def note(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(logits.dtype)
        return logits

    trainer = Trainer(
        model,
        arguments(tmp_path, max_steps=3, bf16=True, eval_strategy="steps", eval_steps=3),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        compute_metrics=lambda prediction: {},
        preprocess_logits_for_metrics=note,
    )
    tunerkit.attach(model, trainer)
    trainer.train()
    trainer.evaluate()
    assert len(seen) > 1
    assert set(seen) == {torch.float32}


def test_a_second_training_has_the_precision_of_its_own_trainer(model: Any, tmp_path: Path) -> None:
    """Accelerate prepares a model once: another trainer of the model would train as the first one did."""
    noted = Dtypes(model)
    for bf16 in (False, True, False):
        trainer = trainer_of(model, tmp_path, bf16=bf16)
        for _ in range(2):
            noted.seen.clear()
            trainer.train()
            assert set(noted.seen) == {torch.bfloat16 if bf16 else torch.float32}


def test_a_trainer_in_fp32_is_left_alone(model: Any, tmp_path: Path) -> None:
    """There is no autocast, and evaluations are in fp32."""
    noted = Dtypes(model)
    trainer = trainer_of(model, tmp_path, bf16=False)
    trainer.train()
    trainer.evaluate()
    assert set(noted.seen) == {torch.float32}
