"""Errors of a training that ran out of memory, and what they say to do."""

import functools
from collections.abc import Callable
from typing import Any, Final

import torch

from tunerkit_transformers.planning import Plan

# Torch has no class of its own for a CPU that has no memory left.
_OF_A_CPU: Final = ("defaultcpuallocator", "can't allocate memory", "not enough memory")
_MARK: Final = "_tunerkit_plan"


def is_out_of_memory(problem: BaseException) -> bool:
    """Whether an exception says that memory ran out, on an accelerator or on a CPU."""
    if isinstance(problem, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(problem, RuntimeError) and any(words in str(problem).lower() for words in _OF_A_CPU)


def advice_on(plan: Plan | None) -> str:
    """What the training needs, and what would take less, in one sentence."""
    if plan is None:
        return "gradient checkpointing, smaller batches or a 4-bit base take less"
    return f"the training takes {plan.parts()}{f': {found}' if (found := plan.advice()) else ''}"


def note_memory_(trainer: Any, plan: Plan | None) -> None:
    """Let an error of memory in ``trainer.train`` have a note with what would take less."""
    if not hasattr(trainer, _MARK):
        trainer.train = functools.partial(_train, trainer, trainer.train)
    setattr(trainer, _MARK, plan)


def noted_plan(trainer: Any) -> Plan | None:
    """The plan of a trainer that `note_memory_` has had, or None."""
    return getattr(trainer, _MARK, None)


def _train(trainer: Any, train: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        return train(*arguments, **options)
    except (RuntimeError, MemoryError) as problem:
        if is_out_of_memory(problem):
            problem.add_note(f"tunerkit: {advice_on(noted_plan(trainer))}")
        raise
