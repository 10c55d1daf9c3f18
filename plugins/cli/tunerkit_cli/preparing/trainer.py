"""The trainer of a task: its arguments from a recipe's ``training``, and a trainer that can be resumed exactly."""

import dataclasses
import math
import tempfile
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, PrinterCallback, get_scheduler
from transformers.integrations.integration_utils import TensorBoardCallback, get_reporting_integration_callbacks

from tunerkit import TunerkitError
from tunerkit.errors import ConfigError, shown
from tunerkit_cli.folder import CHECKPOINTS, LOGS
from tunerkit_cli.machine import hardware
from tunerkit_cli.machine.processes import count
from tunerkit_cli.recipes.recipe import Recipe
from tunerkit_cli.recipes.trainer_arguments import name_problem
from tunerkit_cli.report.scores import is_better_high
from tunerkit_cli.tasks.base import Task
from tunerkit_transformers.exact_resuming import resume_exactly_

_DEFAULTS: Mapping[str, Any] = {
    "report_to": "none",
    "disable_tqdm": True,
    "logging_strategy": "steps",
    "logging_steps": 0.02,  # of all steps
    "logging_nan_inf_filter": False,  # a loss that is not finite must be seen
    "save_strategy": "steps",
    "save_steps": 0.1,
    "save_total_limit": 2,
    "seed": 0,
}
# Numbers below these make no training, or fail in the middle of one.
_LEAST = {
    **{"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1},
    **{"dataloader_num_workers": 0, "eval_accumulation_steps": 1},
}
_MOST_WORKERS = 256  # thousands of processes would start one after another
_POSITIVE = ("learning_rate", "num_train_epochs")
DECIDED = "gradient_checkpointing"  # by the memory of the machine on which a run begins
_SEEDS = ("seed", "data_seed")  # numpy takes no greater ones than 32 bits hold


def asked_of(recipe: Recipe, task: Task) -> dict[str, Any]:
    """What a recipe asks of the trainer."""
    asked = dict(recipe.training)
    if task.batch_counts:  # held-out rows come in batches of as many rows, so that both losses compare
        size = asked.get("per_device_train_batch_size", task.defaults["per_device_train_batch_size"])
        asked.setdefault("per_device_eval_batch_size", size * count() if isinstance(size, int) else size)
    if recipe.early_stopping_patience is not None:
        asked = {"load_best_model_at_end": True, **asked}
        if not asked["load_best_model_at_end"]:
            do = "leave training.load_best_model_at_end out"
            raise ConfigError([f"early_stopping_patience: keeps the best checkpoint; {do}"])
    # The best checkpoint is found by evaluations, and must be one that is kept.
    if {"load_best_model_at_end", "metric_for_best_model"} & asked.keys():
        asked["eval_strategy"] = recipe.training.get("eval_strategy", "epoch")
    if asked.get("load_best_model_at_end"):
        asked.setdefault("save_strategy", asked["eval_strategy"])
        asked |= {"save_steps": asked["eval_steps"]} if "eval_steps" in asked and "save_steps" not in asked else {}
    return asked


class Stopping(EarlyStoppingCallback):
    """Ends a training early. A resumed one counts from its log how often it has waited."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        best = state.best_global_step or 0
        self.early_stopping_patience_counter = sum(
            "eval_loss" in entry and entry["step"] > best for entry in state.log_history
        )


def arguments_of(recipe: Recipe, task: Task) -> dict[str, Any]:
    """The trainer's arguments of a recipe, with the task's where it is silent."""
    return {**task.defaults, **asked_of(recipe, task)}


def trainer_arguments(task: Task, training: Mapping[str, Any], out: Path, *, precision: str, has_eval: bool) -> Any:
    """Build the arguments of the task's trainer: ours, the task's, those of the recipe. Raises `ConfigError`."""
    _, kind = task.trainer_classes()
    names = {field.name for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    problems = []
    for name, value in training.items():
        if (problem := name_problem(name, task.name)) is not None:
            problems.append(problem)
        elif (wanted := _wanted(name, value, hints[name])) is not None:
            problems.append(f"training.{name}: expected {wanted}, got {'null' if value is None else shown(value)}")
    if problems:
        raise ConfigError(problems)
    ours = {**_DEFAULTS, **hardware.trainer_settings(hardware.choose_device(), precision)}
    if count() > 1:  # losses of other tasks are means over a batch, which must not be multiplied by the processes
        ours["average_tokens_across_devices"] = task.name == "causal-lm"
    settings = {**ours, **task.defaults, **training, "output_dir": str(out / CHECKPOINTS)}
    if not has_eval:
        settings["eval_strategy"] = "no"
    if settings.get("load_best_model_at_end") and settings.get("eval_strategy", "no") in ("no", False):
        do = "hold rows out, and set training.eval_strategy to epoch or steps"
        raise ConfigError([f"early_stopping_patience and load_best_model_at_end need evaluations: {do}"])
    if "max_length" in names and "max_length" not in training:
        settings["max_length"] = task.limit
    if isinstance(best := training.get("metric_for_best_model"), str):  # transformers takes an error for a score
        settings.setdefault("greater_is_better", is_better_high(best))
    with _refusing():
        arguments = kind(**settings)
        # Where it is fp32, transformers would take what the environment says, as `accelerate config` may leave it.
        arguments.mixed_precision = "no" if precision == "fp32" else precision
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()  # reports a logger that is unknown or not installed
        return arguments


@contextmanager
def _refusing() -> Iterator[None]:
    """Inside the block, a library's error about values that it was given is a `ConfigError`."""
    try:
        yield
    except TunerkitError:
        raise
    except (TypeError, ValueError, ImportError, AttributeError, RuntimeError, OverflowError) as problem:
        raise ConfigError([f"training: {' '.join(str(problem).split()) or type(problem).__name__}"]) from problem


def _wanted(name: str, value: Any, hint: Any) -> str | None:
    """What a number or boolean should be that would fail late, or train nothing; None if it is all right."""
    is_union, kind = typing.get_origin(hint) in (types.UnionType, typing.Union), type(value)
    allowed = {*typing.get_args(hint)} if is_union else {hint}
    if not allowed <= {int, float, bool, type(None)}:
        return None
    if kind not in allowed and not (kind is int and (float in allowed or (bool in allowed and value in (0, 1)))):
        numbers = allowed - {bool, type(None)}
        return "true or false" if not numbers else "a whole number" if kind is float else "a number"
    if kind is float and math.isnan(value):
        return "a number"
    if name in _SEEDS and value is not None and not 0 <= value < 2**32:
        return "a whole number from 0 to 4294967295"
    if kind is int and not -(2**63) <= value < 2**63:
        return "a number of at most 64 bits"
    if name == "neftune_noise_alpha" and value is not None and not 0 <= value < math.inf:
        return "a number from 0 up"
    if name in _LEAST and value is not None and value < _LEAST[name]:
        return f"at least {_LEAST[name]}"
    if name == "dataloader_num_workers" and value > _MOST_WORKERS:
        return f"at most {_MOST_WORKERS}"
    return "a number above 0" if name in _POSITIVE and not 0 < value < math.inf else None


# --- the trainer itself ---


def build_trainer(kind: type[Any], arguments: Any, *, callbacks: Sequence[Any] = (), **settings: Any) -> Any:
    """Build a trainer. It would create its folder at once: nothing may be left of a run that is refused."""
    wanted = Path(arguments.output_dir)
    with tempfile.TemporaryDirectory() as scratch, _refusing():
        arguments.output_dir = scratch
        trainer = kind(args=arguments, callbacks=[*callbacks], **settings)
    arguments.output_dir = trainer.args.output_dir = str(wanted)  # a trainer may copy its arguments
    trainer.remove_callback(PrinterCallback)
    for each in trainer.callback_handler.callbacks:
        if isinstance(each, TensorBoardCallback):  # unless the environment names a folder
            each.logging_dir = each.logging_dir or str(wanted.parent / LOGS)
    resume_exactly_(trainer)
    return trainer


def refuse_untrainable(trainer: Any) -> None:
    """Raise `ConfigError` if what the trainer builds only when training begins refuses a value: optimizer, schedule."""
    arguments = trainer.args
    batches = {"train": (trainer.train_dataset, arguments.train_batch_size)}
    if trainer.eval_dataset is not None and arguments.eval_strategy != "no":
        batches["eval"] = (trainer.eval_dataset, arguments.eval_batch_size)
    for name, (rows, size) in batches.items():
        if arguments.dataloader_drop_last and len(rows) < size:
            raise ConfigError(
                [
                    f"training.dataloader_drop_last: leaves nothing of {len(rows)} {name} rows, as a batch has {size}; "
                    f"leave it out, or lower training.per_device_{name}_batch_size"
                ]
            )
    with _refusing():
        kind, settings = trainer.get_optimizer_cls_and_kwargs(arguments, trainer.model)
        if not isinstance(kind, type) or {"params", "model", "optimizer_dict"} & settings.keys():
            return  # it needs the model's own parameters, or hooks them
        optimizer = kind([torch.nn.Parameter(torch.zeros(1, 1))], **settings)
        steps = 100  # any number: the schedule is thrown away
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=arguments.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=dict(arguments.lr_scheduler_kwargs or {}),
        )
