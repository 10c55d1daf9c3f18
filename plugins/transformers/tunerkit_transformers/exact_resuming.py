"""Make a resumed Trainer draw, log and evaluate the same as an uninterrupted one."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.data import BatchSampler
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LengthGroupedSampler

from tunerkit_transformers import transformers_private


def resume_exactly_(trainer: Any) -> None:
    """Add `Resumable` to a Trainer, and wrap the Trainer's methods that draw batches and log."""
    resumable = Resumable(trainer)
    trainer.add_callback(resumable)
    trainer.args.restore_callback_states_from_checkpoint = False  # it would build another one
    trainer.get_batch_samples = partial(_batches, trainer, trainer.get_batch_samples)
    trainer.log = partial(resumable.log, trainer.log)


def _batches(trainer: Any, draw: Callable[..., Any], *arguments: Any) -> Any:
    """Return the batches of the next step; none after the last step.

    A training that ended inside an epoch still has that epoch's evaluation to do. If it is resumed from its last step,
    the Trainer enters the epoch again, and would take one more step before the evaluation.
    """
    return ([], None) if trainer.state.global_step >= trainer.state.max_steps else draw(*arguments)


class Resumable(TrainerCallback, ExportableState):
    """Gives a resumed training the batches, random numbers and logs of an uninterrupted one.

    - Batches grouped by length depend only on the seed and the epoch. The Trainer's own also depend on all random
      numbers drawn before the epoch, such as dropout's.
    - A checkpoint at an epoch's end is written after the evaluation and contains it, so it is not repeated.
    - A checkpoint stores the sum of the losses, so that logged means cover the whole run.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._has_losses = True  # not in a checkpoint of an earlier version
        self._is_due = False  # whether a checkpoint waits for the end of the epoch

    def state(self) -> dict[str, Any]:
        """Return the values that a checkpoint stores."""
        return {"args": {}, "attributes": {}, "losses": transformers_private.losses(self.trainer)}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        states: Any = state.stateful_callbacks  # a mapping by now
        kept = states.get(type(self).__name__)
        states.setdefault(type(self).__name__, self.state())
        if state.global_step > 0:
            losses = kept.get("losses") if isinstance(kept, dict) else None
            self._has_losses = transformers_private.set_losses_(self.trainer, losses)

    def log(self, call: Callable[..., None], logs: dict[str, float], *arguments: Any) -> None:
        """Log with ``call``; replace the Trainer's final mean loss, which covers only the steps since resuming."""
        if "train_loss" in logs and self._has_losses:
            added = transformers_private.losses(self.trainer)["logged"]
            logs = {**logs, "train_loss": added / max(self.trainer.state.global_step, 1)}
        call(logs, *arguments)

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        batches = kwargs["train_dataloader"].batch_sampler
        batches = getattr(batches, "batch_sampler", batches)  # of all processes
        if isinstance(batches, BatchSampler) and isinstance(batches.sampler, LengthGroupedSampler):
            batches.sampler.batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            seed = args.seed if args.data_seed is None else args.data_seed
            batches.sampler.lengths = batches.sampler.lengths[:]  # a column is read from its table for each row
            batches.sampler.generator = torch.Generator().manual_seed(seed + int(state.epoch or 0))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save and is_whole(state.epoch):
            control.should_save, self._is_due = False, True

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_save, self._is_due = control.should_save or self._is_due, False
        if any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history):
            control.should_evaluate = False


def is_whole(epoch: float | None) -> bool:
    """Whether the training is at the end of an epoch."""
    return epoch is not None and epoch == int(epoch)
