"""A Trainer's checkpoints and logs with adapters: adapter files in place of the model's, ranks and budget in the logs.

The Trainer knows adapters only as peft's classes, so the few methods that read and write weights are taken over on
the instance, and the rest of its checkpointing stays its own.
"""

import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from tunerkit import registry
from tunerkit.errors import FileError
from tunerkit.files import FILE_NAME, save_tuner
from tunerkit.resume import STATE_NAME, load_tuner_state, restore_, save_tuner_state
from tunerkit.tuner import Tuner


class Resuming(Protocol):
    """What remembers the checkpoint that a training resumes from."""

    resumed: Path | None


def take_over_(trainer: Trainer, tuners: list[Tuner], resuming: Resuming) -> None:
    """Let ``trainer`` write and read ``tuners`` (a list that may grow) where it would write and read its model."""
    own: Any = trainer  # replacing a method on an instance is what type checkers are there to stop
    own._save = functools.partial(_save, trainer, tuners)
    own._save_optimizer_and_scheduler = functools.partial(_save_states, tuners, trainer._save_optimizer_and_scheduler)
    own._load_from_checkpoint = functools.partial(_load, tuners, resuming, trainer._load_from_checkpoint)
    own._load_best_model = functools.partial(_load_best, trainer, tuners)
    own.log = functools.partial(_log, tuners, {}, trainer.log)


def folder_of(checkpoint: Path, tuners: Sequence[Tuner], tuner: Tuner) -> Path:
    """Where one adapter's files lie: in the checkpoint itself if it is the only one, else in a folder by its name."""
    if len(tuners) == 1:
        return checkpoint
    # Names may hold anything, and file systems may not tell "a" from "A".
    plain = re.fullmatch(r"[a-z0-9_-]+", tuner.name)
    return checkpoint / (tuner.name if plain else hashlib.sha256(tuner.name.encode()).hexdigest()[:16])


def load_states(tuners: Sequence[Tuner], checkpoint: Path) -> None:
    """Restore the training states that lie in ``checkpoint``; refuse to begin anew where a method needs its own."""
    for tuner in tuners:
        folder = folder_of(checkpoint, tuners, tuner)
        if (folder / STATE_NAME).is_file():
            load_tuner_state(tuner, folder)
        elif registry.get(tuner.method).needs_steps:
            raise FileError(
                f"{checkpoint} has no {STATE_NAME} for adapter {tuner.name!r} (save_only_model?), and method "
                f"{tuner.method!r} cannot go on without; load the adapter from it and begin a new training instead"
            )


def _save(trainer: Trainer, tuners: Sequence[Tuner], output_dir: str | None = None, state_dict: Any = None) -> None:
    """Write the adapters, and beside them what the Trainer writes beside a model: the processor and its arguments."""
    if not trainer.args.should_save:
        return
    folder = Path(output_dir if output_dir is not None else str(trainer.args.output_dir))
    for tuner in tuners:
        save_tuner(tuner, folder_of(folder, tuners, tuner))
    processor = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
    if processor is not None:
        processor.save_pretrained(folder)
    torch.save(trainer.args, folder / TRAINING_ARGS_NAME)


def _save_states(tuners: Sequence[Tuner], save_optimizer: Callable[[str], None], output_dir: str) -> None:
    """The training states go where the optimizer's goes, and stay away where it does."""
    for tuner in tuners:
        save_tuner_state(tuner, folder_of(Path(output_dir), tuners, tuner))
    save_optimizer(output_dir)


def _load(
    tuners: Sequence[Tuner],
    resuming: Resuming,
    load_model: Callable[..., None],
    resume_from_checkpoint: str,
    model: nn.Module | None = None,
) -> None:
    """Put a checkpoint's adapters into the live ones, ranks first: the optimizer's state then fits what is loaded."""
    checkpoint = Path(resume_from_checkpoint)
    files = {tuner: folder_of(checkpoint, tuners, tuner) for tuner in tuners}
    if not any((folder / FILE_NAME).is_file() for folder in files.values()):
        load_model(resume_from_checkpoint, model)  # a whole model's, from before this trainer was attached
        return
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        raise FileError(
            f"{checkpoint} is not complete: its writing was interrupted before {TRAINER_STATE_NAME}; resume from an "
            "earlier checkpoint"
        )
    for tuner, folder in files.items():
        restore_(tuner, folder)
    resuming.resumed = checkpoint


def _load_best(trainer: Trainer, tuners: Sequence[Tuner]) -> None:
    """The best checkpoint's adapters, of whatever ranks they were, with the training state that goes with them."""
    checkpoint = Path(str(trainer.state.best_model_checkpoint))
    for tuner in tuners:
        folder = folder_of(checkpoint, tuners, tuner)
        restore_(tuner, folder)
        if (folder / STATE_NAME).is_file():
            load_tuner_state(tuner, folder)


def _log(
    tuners: Sequence[Tuner],
    told: dict[str, int],
    log: Callable[..., None],
    logs: dict[str, float],
    *args: Any,
    **kwargs: Any,
) -> None:
    """Add the budget to each row with a training loss, and the ranks to the first one after an allocation.

    ``told`` remembers how many allocations of each adapter have been logged: a row per step with the ranks of all
    targets would drown the loss.
    """
    if "loss" in logs:
        for tuner in tuners:
            if not registry.implements("tunerkit_budget", tuner.method):
                continue
            prefix = "" if len(tuners) == 1 else f"{tuner.name}/"
            logs[f"{prefix}budget"] = tuner.budget()
            if told.get(tuner.name) != len(tuner.history):
                told[tuner.name] = len(tuner.history)
                logs |= {f"{prefix}rank/{path}": rank for path, rank in tuner.ranks().items()}
    log(logs, *args, **kwargs)
