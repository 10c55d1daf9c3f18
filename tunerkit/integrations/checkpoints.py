"""A Trainer's checkpoints and logs with adapters: adapter files in place of the model's, ranks and budget in the logs.

The Trainer knows adapters only as peft's classes, so the few methods that read and write weights are taken over on
the instance, and the rest of its checkpointing stays its own.
"""

import functools
import hashlib
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tunerkit.errors import FileError, TunerkitWarning
from tunerkit.hooks import registry
from tunerkit.injection import Tuner
from tunerkit.libraries import transformers_private
from tunerkit.serialization import (
    FILE_NAME,
    STATE_NAME,
    forget_state_,
    load_tuner_state,
    restore_,
    save_tuner,
    save_tuner_state,
)


class Attached(Protocol):
    """The adapters of a trainer that are in its model now, and the checkpoint that a training resumes from."""

    resumed: Path | None

    @property
    def tuners(self) -> list[Tuner]:
        """May change between two calls."""

    def release(self) -> None:
        """Called when a training is over."""


def take_over_(trainer: Trainer, attached: Attached) -> None:
    """Let ``trainer`` write and read adapters where it would write and read its model."""
    _tell_of_overrides(trainer)
    own: Any = trainer  # replacing a method on an instance is what type checkers are there to stop
    transformers_private.replace_(
        trainer,
        save=functools.partial(_save, trainer, attached),
        save_states=functools.partial(_save_states, trainer, attached),
        load=functools.partial(_load, attached),
        load_best=functools.partial(_load_best, trainer, attached),
    )
    own.log = functools.partial(_log, attached, {}, trainer.log)
    own.train = functools.partial(_train, attached, trainer.train)


def _tell_of_overrides(trainer: Trainer) -> None:
    kind = type(trainer)
    own = transformers_private.overridden(kind, Trainer)
    if own:
        warnings.warn(
            f"{kind.__name__} has methods of its own that read or write weights ({', '.join(own)}); with adapters "
            "attached they are not called, since what a checkpoint holds is the adapter",
            TunerkitWarning,
            stacklevel=5,
        )


def folder_of(checkpoint: Path, tuners: Sequence[Tuner], tuner: Tuner) -> Path:
    """Where one adapter's files lie: in the checkpoint itself if it is the only one, else in a folder by its name.

    What was written while there were several stays where it is when others are deleted.
    """
    # Names may hold anything, and file systems may not tell "a" from "A".
    plain = re.fullmatch(r"[a-z0-9_-]+", tuner.name)
    named = checkpoint / (tuner.name if plain else hashlib.sha256(tuner.name.encode()).hexdigest()[:16])
    return named if len(tuners) > 1 or (named / FILE_NAME).is_file() else checkpoint


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


def _save(
    trainer: Trainer,
    attached: Attached,
    save_model: Callable[..., None],
    output_dir: str | None = None,
    state_dict: Any = None,
) -> None:
    """Write the adapters, and beside them what the Trainer writes beside a model: the processor and its arguments."""
    tuners = attached.tuners
    if not tuners:
        save_model(output_dir, state_dict)  # unwrapped: it is a model like others again
        return
    if not trainer.args.should_save:
        return
    folder = Path(output_dir if output_dir is not None else str(trainer.args.output_dir))
    if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", folder.name):
        # Written over an earlier run's and interrupted, the folder must not look complete.
        (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
    for tuner in tuners:
        save_tuner(tuner, folder_of(folder, tuners, tuner))
    processor = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
    if processor is not None:
        processor.save_pretrained(folder)
    torch.save(trainer.args, folder / TRAINING_ARGS_NAME)


def _save_states(trainer: Trainer, attached: Attached, save_optimizer: Callable[[str], None], output_dir: str) -> None:
    """The training states go where the optimizer's goes, and stay away where it does."""
    tuners = attached.tuners
    for tuner in tuners if trainer.args.should_save else ():
        save_tuner_state(tuner, folder_of(Path(output_dir), tuners, tuner))
    save_optimizer(output_dir)


def _load(
    attached: Attached,
    load_model: Callable[..., None],
    resume_from_checkpoint: str,
    model: nn.Module | None = None,
) -> None:
    """Put a checkpoint's adapters into the live ones, ranks first: the optimizer's state then fits what is loaded."""
    checkpoint, tuners = Path(resume_from_checkpoint), attached.tuners
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
    attached.resumed = checkpoint


def _load_best(trainer: Trainer, attached: Attached, load_model: Callable[[], None]) -> None:
    """The best checkpoint's adapters, of whatever ranks they were, with the training state that goes with them."""
    checkpoint, tuners = Path(str(trainer.state.best_model_checkpoint)), attached.tuners
    folders = {tuner: folder_of(checkpoint, tuners, tuner) for tuner in tuners}
    if not any((folder / FILE_NAME).is_file() for folder in folders.values()):
        load_model()  # a whole model's; where there is nothing at all, the Trainer says so
        return
    for tuner, folder in folders.items():
        restore_(tuner, folder)
        if (folder / STATE_NAME).is_file():
            load_tuner_state(tuner, folder)
        else:
            forget_state_(tuner)


def _train(attached: Attached, train: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """However a training ends, by an exception or a keystroke too, it leaves the adapters free to be attached."""
    try:
        return train(*args, **kwargs)
    finally:
        attached.release()


def _log(
    attached: Attached,
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
        tuners = attached.tuners
        for tuner in tuners:
            if not registry.implements("tunerkit_budget", tuner.method):
                continue
            prefix = "" if len(tuners) == 1 else f"{tuner.name}/"
            logs[f"{prefix}budget"] = tuner.budget()
            if told.get(tuner.name) != len(tuner.history):
                told[tuner.name] = len(tuner.history)
                logs |= {f"{prefix}rank/{path}": rank for path, rank in tuner.ranks().items()}
    log(logs, *args, **kwargs)
