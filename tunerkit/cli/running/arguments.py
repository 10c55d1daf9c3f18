"""The trainer's arguments, from a recipe's ``training``."""

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from tunerkit import ConfigError
from tunerkit.cli.running.output import CHECKPOINTS
from tunerkit.cli.tasks.base import Task
from tunerkit.errors import closest, shown
from tunerkit.libraries import torch_private

# What the command decides: where checkpoints go, and what the trainer must not do with them.
_OURS = {
    "output_dir": "set the recipe's `out`",
    "resume_from_checkpoint": "pass --resume",
    "overwrite_output_dir": "pass --overwrite",
    "disable_tqdm": "progress is shown by tunerkit",
    "do_train": "`tunerkit train` trains",
    "do_eval": "set eval_strategy",
    "do_predict": "call `tunerkit predict`",
}


def trainer_arguments(task: Task, training: Mapping[str, Any], out: Path, *, has_eval: bool) -> Any:
    """Build the arguments of the task's trainer: ours, then the task's, then those of the recipe.

    Args:
        task: The task.
        training: The recipe's ``training``.
        out: The output folder; checkpoints are written into its ``checkpoints``.
        has_eval: Whether there are held-out rows.

    Raises:
        ConfigError: An argument is unknown (with the closest name), belongs to the command, or has a wrong value.
    """
    _, kind = task.trainer_classes()
    names = {field.name for field in dataclasses.fields(kind)}
    problems = [f"training.{name}: {_OURS[name]} instead" for name in training if name in _OURS]
    problems += [
        f"training.{name}: {kind.__name__} has no argument of this name{closest(name, names)}"
        for name in training
        if name not in names and name not in _OURS
    ]
    problems += _wrong_types(kind, training)
    if problems:
        raise ConfigError(problems)
    settings = {**_defaults(names), **task.defaults, **training, "output_dir": str(out / CHECKPOINTS)}
    if not has_eval:
        settings["eval_strategy"] = "no"
    if "max_length" in names and "max_length" not in training:
        settings["max_length"] = task.limit
    try:
        arguments = kind(**settings)
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()  # reports a logger that is unknown or not installed
        return arguments
    except (TypeError, ValueError, ImportError, AttributeError, RuntimeError) as problem:
        raise ConfigError([f"training: {' '.join(str(problem).split())}"]) from problem


def _wrong_types(kind: type[Any], training: Mapping[str, Any]) -> list[str]:
    """Problems with texts and lists where the trainer needs a number, which it would only see while training."""
    hints = typing.get_type_hints(kind)
    numeric = {int, float, bool, type(None)}
    return [
        f"training.{name}: expected a number, got {shown(value)}"
        for name, value in training.items()
        if not isinstance(value, int | float | None)
        and set(typing.get_args(hints.get(name)) or [hints.get(name)]) <= numeric
    ]


def _defaults(names: set[str]) -> dict[str, Any]:
    device = choose_device()
    settings = {
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "steps",
        "logging_steps": 0.02,  # of all steps
        "logging_nan_inf_filter": False,  # a loss that is not finite must be seen
        "save_strategy": "steps",
        "save_steps": 0.1,
        "save_total_limit": 2,
        "seed": 0,
        "bf16": has_bf16(device),
        "dataloader_pin_memory": device.type != "cpu",
    }
    return {name: value for name, value in settings.items() if name in names}


def choose_device() -> torch.device:
    """Return the accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def has_bf16(device: torch.device) -> bool:
    """Whether ``device`` multiplies matrices faster in bf16 than in fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # With AVX-512's bf16 the casts cost more than is saved: a step of the demo took 1.4 times as long as in fp32.
    return device.type == "cpu" and torch_private.multiplies_bf16_in_tiles()
