"""The trainer's arguments: our defaults, and what is refused before a trainer sees it."""

import dataclasses
import importlib.util
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality.collapse import AFTER
from tunerkit.errors import ConfigError
from tunerkit_cli.preparing.trainer import build_trainer, trainer_arguments
from tunerkit_cli.recipes import trainer_arguments as trainer_arguments_of
from tunerkit_cli.recipes.trainer_arguments import argument_types, text_alone
from tunerkit_cli.tasks import TASKS, task_of
from tunerkit_cli.tasks.base import MissingPackageError


def arguments_for(task: str = "text-classification", **training: Any) -> Any:
    return trainer_arguments(task_of(task), training, Path("out"), precision="fp32", has_eval=True)


def problems_of(task: str = "text-classification", **training: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as raised:
        arguments_for(task, **training)
    return raised.value.problems


def test_the_precision_is_not_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate's launcher sets it there, and transformers would train in bf16 where the run says fp32."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert arguments_for().mixed_precision == "no"


def test_values_of_the_wrong_kind_are_all_named() -> None:
    """Transformers takes them, and fails at the first step, or trains nothing."""
    assert problems_of(
        learning_rate=None,
        num_train_epochs=0,
        per_device_train_batch_size=8.5,
        per_device_eval_batch_size=0,
        gradient_accumulation_steps=-1,
        seed="three",
        max_grad_norm=[1],
    ) == (
        "training.learning_rate: expected a number, got null",
        "training.num_train_epochs: expected a number above 0, got 0",
        "training.per_device_train_batch_size: expected a whole number, got 8.5",
        "training.per_device_eval_batch_size: expected at least 1, got 0",
        "training.gradient_accumulation_steps: expected at least 1, got -1",
        "training.seed: expected a number, got 'three'",
        "training.max_grad_norm: expected a number, got [1]",
    )
    assert problems_of(dataloader_num_workers=-1, eval_accumulation_steps=0) == (
        "training.dataloader_num_workers: expected at least 0, got -1",
        "training.eval_accumulation_steps: expected at least 1, got 0",
    )
    (many,) = problems_of(dataloader_num_workers=9999)
    assert many == "training.dataloader_num_workers: expected at most 256, got 9999"
    assert problems_of(seed=2**32, data_seed=-1, max_grad_norm=float("nan"), neftune_noise_alpha=-1.0) == (
        "training.seed: expected a whole number from 0 to 4294967295, got 4294967296",
        "training.data_seed: expected a whole number from 0 to 4294967295, got -1",
        "training.max_grad_norm: expected a number, got nan",
        "training.neftune_noise_alpha: expected a number from 0 up, got -1.0",
    )
    assert problems_of(per_device_train_batch_size=2**63, learning_rate=10**20) == (
        "training.per_device_train_batch_size: expected a number of at most 64 bits, got 9223372036854775808",
        "training.learning_rate: expected a number of at most 64 bits, got 100000000000000000000",
    )
    assert problems_of(learning_rate=float("inf"), num_train_epochs=True) == (
        "training.learning_rate: expected a number above 0, got inf",
        "training.num_train_epochs: expected a number, got True",
    )


@pytest.mark.parametrize("task", TASKS)
def test_every_default_of_a_trainer_is_a_value_that_it_may_have(task: str) -> None:
    """So what is refused is never what would have been there without it."""
    try:
        _, kind = task_of(task).trainer_classes()
    except MissingPackageError as problem:
        pytest.skip(str(problem))
    fields = {field.name: field.default for field in dataclasses.fields(kind)}
    numbers = {name: value for name, value in fields.items() if isinstance(value, int | float | None)}
    ours = {"disable_tqdm", "do_train", "do_eval", "do_predict", "output_dir", "resume_from_checkpoint"}
    of_the_device = {"bf16", "fp16", "use_cpu"}
    given = {name: numbers[name] for name in numbers.keys() - ours - of_the_device if "hub" not in name}
    assert len(given) > 50
    arguments_for(task, **{**given, "lr_scheduler_kwargs": None, "report_to": "none"})


def test_the_direction_of_a_metric_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers takes all but losses for scores, and would keep the checkpoint with the greatest error."""
    assert arguments_for("regression", metric_for_best_model="mae").greater_is_better is False
    assert arguments_for("regression", metric_for_best_model="r2").greater_is_better is True
    assert arguments_for("regression", metric_for_best_model="mae", greater_is_better=True).greater_is_better is True


def test_what_a_trainer_refuses_when_it_is_built_is_an_error_of_ours() -> None:
    """One line, as for what its arguments refuse."""

    class Refusing:
        def __init__(self, **_: object) -> None:
            raise NotImplementedError("not\nyet")

    with pytest.raises(ConfigError, match=r"^training: not yet$"):
        build_trainer(Refusing, arguments_for())


@pytest.fixture(autouse=True)
def _read_anew() -> Iterator[None]:
    """What is read from files is kept as long as the process lives."""
    trainer_arguments_of._fields.cache_clear()
    yield
    trainer_arguments_of._fields.cache_clear()


@pytest.mark.parametrize("task", TASKS)
def test_the_arguments_that_are_read_from_files_are_those_of_the_class(task: str) -> None:
    """Law: they have the same names, and are texts alone only where the class takes no number or boolean."""
    try:
        _, kind = task_of(task).trainer_classes()
    except MissingPackageError as problem:
        pytest.skip(str(problem))
    found, hints = argument_types(task), typing.get_type_hints(kind)
    assert found.keys() == {field.name for field in dataclasses.fields(kind)}
    for name, annotation in found.items():
        plain = {*typing.get_args(hints[name]), hints[name]} & {bool, int, float}
        assert not (text_alone(annotation) and plain), name
    assert all(text_alone(found[name]) for name in ("eval_strategy", "save_strategy", "report_to", "optim"))


def test_where_a_file_has_moved_the_class_itself_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A release of transformers may cut its files in another way."""
    read = argument_types("regression")
    trainer_arguments_of._fields.cache_clear()
    monkeypatch.setattr(trainer_arguments_of, "_USUAL", ("TrainingArguments", "transformers/gone.py"))
    found = argument_types("regression")
    assert found.keys() == read.keys()
    assert all(text_alone(found[name]) == text_alone(read[name]) for name in read)


def test_without_a_task_the_arguments_of_every_trainer_may_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """The task may follow from the data. A trainer whose package is missing has none."""
    pytest.importorskip("trl", reason="the task preference needs the extra [lm]")
    assert {"beta", "packing", "generation_max_length"} <= argument_types().keys()
    assert "packing" not in argument_types("preference")
    assert "beta" not in argument_types("causal-lm")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trl" else real(name))
    trainer_arguments_of._fields.cache_clear()
    assert "beta" not in argument_types()
    assert "learning_rate" in argument_types()


def test_heads_that_start_at_random_are_trained_as_was_measured() -> None:
    """Law: a default is what the grids of docs/evidence/quality-record.md ran with."""
    measured = AFTER.training
    kinds = (
        "text-classification",
        "regression",
        "multi-label",
        "image-classification",
        "token-classification",
    )
    tasks = {kind: arguments_for(kind) for kind in kinds}
    for own in tasks.values():
        assert (own.warmup_steps, own.adam_beta2, own.max_grad_norm) == (
            *(measured["warmup"], measured["beta2"], measured["clip"]),
        )
        assert own.lr_scheduler_type == "linear"
    assert [own.learning_rate for own in tasks.values()] == [*[AFTER.rate] * 3, *[AFTER.faster] * 2]


@pytest.mark.parametrize(("task", "rate"), [("causal-lm", 2e-4), ("preference", 5e-5), ("seq2seq", 1e-3)])
def test_language_models_are_trained_with_the_customary_values(task: str, rate: float) -> None:
    """Those of Adam's authors and of transformers, with a warm-up of 6 %."""
    own = arguments_for(task)
    assert (own.learning_rate, own.warmup_steps, own.adam_beta2, own.max_grad_norm) == (rate, 0.06, 0.999, 1.0)
