"""Recognize out-of-memory errors of a training, and add advice to them."""

import functools
from collections.abc import Callable
from typing import Any, Final

import torch

from tunerkit_transformers.memory_plan import Plan

# Torch has no class of its own for a CPU that has no memory left.
_OF_A_CPU: Final = ("defaultcpuallocator", "can't allocate memory", "not enough memory")
_MARK: Final = "_tunerkit_plan"


def is_out_of_memory(problem: BaseException) -> bool:
    """Whether an exception is an out-of-memory error, of an accelerator or a CPU."""
    if isinstance(problem, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(problem, RuntimeError) and any(words in str(problem).lower() for words in _OF_A_CPU)


def advice_on(plan: Plan | None) -> str:
    """Return one sentence with the memory that a training takes, and with settings that save memory."""
    if plan is None:
        return "gradient checkpointing, smaller batches or a 4-bit base take less"
    return f"the training takes {plan.parts()}{f': {found}' if (found := plan.advice()) else ''}"


def note_memory_(trainer: Any, plan: Plan | None) -> None:
    """Replace ``trainer.train`` by a function that adds a note with advice to out-of-memory errors."""
    if not hasattr(trainer, _MARK):
        trainer.train = functools.partial(_train, trainer, trainer.train)
    setattr(trainer, _MARK, plan)


def noted_plan(trainer: Any) -> Plan | None:
    """Return the plan that `note_memory_` stored in a trainer, or None."""
    return getattr(trainer, _MARK, None)


def _train(trainer: Any, train: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        return train(*arguments, **options)
    except (RuntimeError, MemoryError) as problem:
        if is_out_of_memory(problem):
            problem.add_note(f"tunerkit: {advice_on(noted_plan(trainer))}")
        raise
