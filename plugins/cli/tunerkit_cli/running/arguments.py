"""The trainer's arguments, from a recipe's ``training``."""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from tunerkit import ConfigError, TunerkitError
from tunerkit.errors import closest, shown
from tunerkit_cli.demo import demo_of
from tunerkit_cli.recipes.recipe import Recipe
from tunerkit_cli.report.scores import is_better_high
from tunerkit_cli.running import hardware
from tunerkit_cli.running.written import CHECKPOINTS
from tunerkit_cli.tasks.base import Task

# What the command decides: where checkpoints go, and what the trainer must not do with them.
_OURS: Mapping[str, str] = {
    "output_dir": "set the recipe's `out` instead",
    "resume_from_checkpoint": "pass --resume instead",
    "overwrite_output_dir": "pass --overwrite instead",
    "disable_tqdm": "progress is shown by tunerkit instead",
    "do_train": "`tunerkit train` trains instead",
    "do_eval": "set eval_strategy instead",
    "do_predict": "call `tunerkit predict` instead",
    "debug": "leave it out: a loss that is not finite is reported anyway, and transformers' own search for it fails on "
    "masks",
    # A token in a recipe would stand in every file that is shared.
    "hub_token": "log in with `hf auth login`, which private models need too; upload the folder afterwards: "
    "hf upload NAME OUT",
}
_UPLOAD = "upload the folder afterwards: hf upload NAME OUT"
# Numbers below these make no training, or fail in the middle of one.
_LEAST = {
    **{"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1},
    **{"dataloader_num_workers": 0, "eval_accumulation_steps": 1},
}
_POSITIVE = ("learning_rate", "num_train_epochs")
_SEEDS = ("seed", "data_seed")  # numpy takes no greater ones than 32 bits hold


def asked_of(recipe: Recipe, task: Task) -> dict[str, Any]:
    """What a recipe asks of the trainer, itself or because it trains on the demo's data."""
    demo = {} if recipe.data is not None else demo_of(task.name, "data").training
    return {**demo, **recipe.training}


def arguments_of(recipe: Recipe, task: Task) -> dict[str, Any]:
    """The trainer's arguments of a recipe, with the task's where it is silent."""
    return {**task.defaults, **asked_of(recipe, task)}


def trainer_arguments(task: Task, training: Mapping[str, Any], out: Path, *, precision: str, has_eval: bool) -> Any:
    """Build the arguments of the task's trainer: ours, then the task's, then those of the recipe.

    Args:
        task: The task.
        training: What a recipe asks for (`asked_of`), without its precision.
        out: The output folder; checkpoints are written into its ``checkpoints``.
        precision: What matrix products are computed in, such as ``"fp32"``.
        has_eval: Whether there are held-out rows.

    Raises:
        ConfigError: An argument is unknown (with the closest name), belongs to the command, or has a wrong value.
    """
    _, kind = task.trainer_classes()
    names = {field.name for field in dataclasses.fields(kind)}
    problems = [f"training.{name}: {ours}" for name in training if (ours := _refusal(name))]
    problems += [
        f"training.{name}: {kind.__name__} has no argument of this name{closest(name, names)}"
        for name in training
        if name not in names and not _refusal(name)
    ]
    problems += _wrong_values(kind, training)
    if problems:
        raise ConfigError(problems)
    settings = {**_defaults(names, precision), **task.defaults, **training, "output_dir": str(out / CHECKPOINTS)}
    if not has_eval:
        settings["eval_strategy"] = "no"
    if "max_length" in names and "max_length" not in training:
        settings["max_length"] = task.limit
    if isinstance(best := training.get("metric_for_best_model"), str):  # transformers takes an error for a score
        settings.setdefault("greater_is_better", is_better_high(best))
    with refusing("training"):
        arguments = kind(**settings)
        # Where it is fp32, transformers would take what the environment says, as `accelerate config` may leave it.
        arguments.mixed_precision = "no" if precision == "fp32" else precision
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()  # reports a logger that is unknown or not installed
        return arguments


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Inside the block, a library's error about values that it was given is a `ConfigError`, which names ``what``."""
    try:
        yield
    except TunerkitError:
        raise
    except (TypeError, ValueError, ImportError, AttributeError, RuntimeError) as problem:
        raise ConfigError([f"{what}: {' '.join(str(problem).split()) or type(problem).__name__}"]) from problem


def _refusal(name: str) -> str | None:
    """Why an argument of the trainer is the command's, and what to do instead; None if it is the recipe's."""
    is_upload = name.startswith(("hub_", "push_to_hub"))
    return _OURS.get(name) or (_UPLOAD if is_upload else None)


def _wrong_values(kind: type[Any], training: Mapping[str, Any]) -> list[str]:
    """Problems with numbers and booleans that the trainer takes, and that fail while training or train nothing."""
    hints = typing.get_type_hints(kind)
    found = []
    for name, value in training.items():
        allowed = _kinds(hints.get(name))
        wanted = _wanted(name, value, allowed) if allowed <= {int, float, bool, type(None)} else None
        if wanted is not None and _refusal(name) is None:
            found.append(f"training.{name}: expected {wanted}, got {'null' if value is None else shown(value)}")
    return found


def _kinds(hint: Any) -> set[Any]:
    """The types in an annotation: those of a union, else its only one."""
    return {*typing.get_args(hint)} if typing.get_origin(hint) in (types.UnionType, typing.Union) else {hint}


def _wanted(name: str, value: Any, allowed: set[Any]) -> str | None:
    """What the value of an argument should be, in words; None if it is all right. ``allowed`` are its types."""
    kind = type(value)
    if kind not in allowed and not (kind is int and (float in allowed or (bool in allowed and value in (0, 1)))):
        numbers = allowed - {bool, type(None)}
        return "true or false" if not numbers else "a whole number" if kind is float else "a number"
    if kind is float and math.isnan(value):
        return "a number"
    if name in _SEEDS and value is not None and not 0 <= value < 2**32:
        return "a whole number from 0 to 4294967295"
    if name == "neftune_noise_alpha" and value is not None and not 0 <= value < math.inf:
        return "a number from 0 up"
    if name in _LEAST and value is not None and value < _LEAST[name]:
        return f"at least {_LEAST[name]}"
    return "a number above 0" if name in _POSITIVE and not 0 < value < math.inf else None


def _defaults(names: set[str], precision: str) -> dict[str, Any]:
    settings = {
        **hardware.trainer_settings(hardware.choose_device(), precision),
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
    return {name: value for name, value in settings.items() if name in names}
