"""A Trainer's checkpoints and logs: adapter files instead of the model's, and the budget in the logs.

The Trainer supports adapters only as peft's classes. So this module replaces the few methods that read and write
weights, on the instance. The rest of the Trainer's checkpointing is unchanged.
"""

import functools
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

import tunerkit
from tunerkit.errors import warn
from tunerkit.plugin import Tuner
from tunerkit.plugin.trainers import folder_of, is_sharded, regrouped, restore_, save_tuner, warn_of_base_changes
from tunerkit_transformers import transformers_private
from tunerkit_transformers.precision import Precision
from tunerkit_transformers.ranks import rows_of, write_ranks
from tunerkit_transformers.resuming import choose_checkpoint, has_file
from tunerkit_transformers.switching import DEEPSPEED, FSDP, without
from tunerkit_transformers.zero_checkpoints import base_may_be_missing, runs_deepspeed, without_base


class Attached(Protocol):
    """A trainer's attached adapters, and the checkpoint from which training resumes."""

    resumed: Path | None

    @property
    def tuners(self) -> list[Tuner]:
        """The attached adapters that are in the model now; they may change between two calls."""

    def release(self) -> None:
        """Detach the adapters, after training."""


def take_over_(trainer: Trainer, attached: Attached) -> None:
    """Make ``trainer`` write and read adapters instead of its model."""
    _warn_of_overrides(trainer)
    own: Any = trainer  # Any: type checkers reject replacing a method on an instance
    transformers_private.replace_(
        trainer,
        save=functools.partial(_save, trainer, attached),
        save_states=functools.partial(_save_states, trainer, attached),
        load=functools.partial(_load, attached),
        load_best=functools.partial(_load_best, trainer, attached),
        load_states=functools.partial(_load_states, trainer, attached),
    )
    own.save_model = functools.partial(_save_model, trainer, attached, trainer.save_model)
    own.log = functools.partial(_log, attached, {}, trainer.log)
    precision = Precision(trainer)
    own.train = functools.partial(_train, trainer, attached, precision, trainer.train)
    own.evaluation_loop = functools.partial(precision.evaluate, trainer.evaluation_loop)
    own.create_optimizer = functools.partial(_create_optimizer, trainer, attached, trainer.create_optimizer)


def _create_optimizer(
    trainer: Trainer, attached: Attached, create: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Build the trainer's optimizer, with the methods' own learning rates and weight decays."""
    given = trainer.optimizer is not None
    optimizer = create(*args, **kwargs)
    if not given:
        optimizer.param_groups[:] = regrouped(optimizer.param_groups, attached.tuners)
    return optimizer


def _warn_of_overrides(trainer: Trainer) -> None:
    kind = type(trainer)
    own = transformers_private.overridden(kind, Trainer)
    if own:
        warn(
            f"{kind.__name__} overrides methods that read or write weights ({', '.join(own)}); with adapters "
            "attached they are not called, because a checkpoint contains the adapter instead of the model"
        )


def restore_weights_(tuners: Sequence[Tuner], checkpoint: Path) -> None:
    """Load the weights in ``checkpoint``, with their ranks, into the live adapters."""
    folders = {tuner: folder_of(checkpoint, tuners, tuner) for tuner in tuners}
    for tuner, folder in folders.items():
        restore_(tuner, folder)


def _has_adapters(checkpoint: Path, tuners: Sequence[Tuner]) -> bool:
    return any(has_file(folder_of(checkpoint, tuners, tuner), "adapter") for tuner in tuners)


def load_states(tuners: Sequence[Tuner], checkpoint: Path) -> None:
    """Restore the training states in ``checkpoint``."""
    for tuner in tuners:
        folder = folder_of(checkpoint, tuners, tuner)
        if has_file(folder, "state"):
            tunerkit.load_state(tuner.model, folder, adapter=tuner.name)


def _save_model(
    trainer: Trainer, attached: Attached, save_model: Callable[..., None], *args: Any, **kwargs: Any
) -> None:
    """Write the adapters; skip the Trainer's gathering of a sharded model."""
    if not attached.tuners:
        save_model(*args, **kwargs)
        return
    with without(trainer, FSDP, DEEPSPEED):
        save_model(*args, **kwargs)


def _save(
    trainer: Trainer,
    attached: Attached,
    save_model: Callable[..., None],
    output_dir: str | None = None,
    state_dict: Any = None,
) -> None:
    """Write the adapters in place of the model, then the processor and the training arguments, like the Trainer."""
    tuners = attached.tuners
    if not tuners:
        save_model(output_dir, state_dict)  # unwrapped: it is an ordinary model again
        return
    folder = Path(output_dir if output_dir is not None else str(trainer.args.output_dir))
    writes = trainer.args.should_save
    if writes and re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", folder.name):
        # If this overwrites an earlier run's folder and is interrupted, the folder must not look complete.
        (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
    held = _held(tuners)
    for tuner in held:
        if not _takes_part(trainer, tuner):
            continue
        written = save_tuner(tuner, folder_of(folder, held, tuner))
        if writes:
            write_ranks(tuner, written.parent)
    if not writes:
        return
    warn_of_base_changes(held, again=False)
    processor = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
    if processor is not None:
        processor.save_pretrained(folder)
    torch.save(trainer.args, folder / TRAINING_ARGS_NAME)


def _takes_part(trainer: Trainer, tuner: Tuner) -> bool:
    """Whether this process takes part in saving an adapter. With DeepSpeed all do, since each may hold a shard."""
    if trainer.args.should_save:
        return True
    return runs_deepspeed(trainer) and (tuner.engine.is_shared or any(map(is_sharded, tuner.parameters())))


def _held(tuners: Sequence[Tuner]) -> list[Tuner]:
    """Return the adapters to save in a checkpoint: the attached ones, and others that are active, such as frozen ones.

    All of them determine the model's output, so a checkpoint without the others would be of another model.
    """
    present, active = tunerkit.adapters(tuners[0].model).values(), tunerkit.active(tuners[0].model)
    return [*tuners, *(other for other in present if other.name in active and other not in tuners)]


def _save_states(trainer: Trainer, attached: Attached, save_optimizer: Callable[[str], None], output_dir: str) -> None:
    """Write the training states whenever the Trainer writes the optimizer's state, into the same folder."""
    tuners = attached.tuners
    for tuner in [each for each in tuners if _takes_part(trainer, each)]:
        folder = folder_of(Path(output_dir), _held(tuners), tuner)
        tunerkit.save_state(tuner.model, folder, adapter=tuner.name)
    if not tuners:
        save_optimizer(output_dir)
        return
    with without(trainer, FSDP), without_base(trainer):
        save_optimizer(output_dir)


def _load_states(trainer: Trainer, attached: Attached, load: Callable[..., None], *args: Any) -> None:
    """Load the optimizer's state, with the same engines switched off as in `_save_states`."""
    with without(trainer, FSDP) if attached.tuners else nullcontext():
        load(*args)


def _load(
    attached: Attached,
    load_model: Callable[..., None],
    resume_from_checkpoint: str,
    model: nn.Module | None = None,
) -> None:
    """Load a checkpoint's adapters into the live ones, before the optimizer's state, which must fit their ranks."""
    checkpoint, tuners = Path(resume_from_checkpoint), attached.tuners
    if not _has_adapters(checkpoint, tuners):
        load_model(resume_from_checkpoint, model)  # a whole model, saved before this trainer was attached
        return
    restore_weights_(tuners, checkpoint)
    attached.resumed = checkpoint


def _load_best(trainer: Trainer, attached: Attached, load_model: Callable[[], None]) -> None:
    """Load the best checkpoint's adapters, with their ranks and their training state."""
    checkpoint, tuners = Path(str(trainer.state.best_model_checkpoint)), attached.tuners
    folders = {tuner: folder_of(checkpoint, tuners, tuner) for tuner in tuners}
    if not any(has_file(folder, "adapter") for folder in folders.values()):
        load_model()  # a whole model; if there is nothing at all, the Trainer reports it
        return
    for tuner, folder in folders.items():
        restore_(tuner, folder)
        if has_file(folder, "state"):
            tunerkit.load_state(tuner.model, folder, adapter=tuner.name)
        else:
            # There is no training state for these weights, nor a history after their step.
            tuner.state = None
            tuner.progress.history[:] = [change for change in tuner.history if change.step <= tuner.steps]


def _train(
    trainer: Trainer, attached: Attached, precision: Precision, train: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Train, then release the adapters, even after an exception or an interrupt, so that they can be attached again.

    The model's own forward is restored too.
    """
    try:
        # Every rank calls this, also without a checkpoint to resume from: the ranks decide together.
        wanted = args[0] if args else kwargs.get("resume_from_checkpoint")
        chosen = choose_checkpoint(trainer, attached.tuners, wanted)
        if args:  # the checkpoint is the first argument; a subclass may take none at all
            args = (chosen, *args[1:])
        elif "resume_from_checkpoint" in kwargs:
            kwargs["resume_from_checkpoint"] = chosen
        if runs_deepspeed(trainer) and isinstance(chosen, str) and _has_adapters(Path(chosen), attached.tuners):
            attached.resumed = Path(chosen)  # DeepSpeed loads its files, and `_load` is not called
            with base_may_be_missing(attached.tuners[0].model), precision.around_training():
                return train(*args, **kwargs)
        with precision.around_training():
            return train(*args, **kwargs)
    finally:
        attached.release()


def _log(
    attached: Attached,
    logged: dict[str, int],
    log: Callable[..., None],
    logs: dict[str, float],
    *args: Any,
    **kwargs: Any,
) -> None:
    """Add the budget and a summary of the ranks to each log entry with a training loss."""
    if "loss" in logs:
        tuners = attached.tuners
        for tuner in tuners:
            logs |= rows_of(tuner, logged, prefix="" if len(tuners) == 1 else f"{tuner.name}/")
    log(logs, *args, **kwargs)
