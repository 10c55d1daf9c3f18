"""Attach adapters to a transformers Trainer, with its own loop, its total steps and its global step."""

import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import tunerkit
from tunerkit.errors import StepError, TunerkitWarning
from tunerkit.plugin import Tuner
from tunerkit.plugin.trainers import (
    detach,
    drive,
    engine_for,
    is_attached,
    refuse_fixed,
    warn_of_base_changes,
    warn_of_unspent_schedule,
)
from tunerkit_transformers.checkpoints import load_states, restore_weights_, take_over_
from tunerkit_transformers.fsdp import leave_out_, refuse_other_shards
from tunerkit_transformers.head_weights import refuse_liger
from tunerkit_transformers.merged_sync import sends_merged
from tunerkit_transformers.trl import refuse_unfit, settle_
from tunerkit_transformers.zero_checkpoints import runs_deepspeed


def attach_trainer(
    tuners: list[Tuner], trainer: Trainer, total_steps: int | None, data_parallel: bool | None = None
) -> None:
    """Let the trainer drive ``tuners`` from the start of training, and include them in its checkpoints and logs."""
    held = tunerkit.adapters(trainer.model).values() if trainer.model is not None else ()
    present = next((cb for cb in trainer.callback_handler.callbacks if isinstance(cb, StepCallback)), None)
    for tuner in tuners:
        if tuner not in held:
            raise StepError(f"the trainer trains another model, without adapter {tuner.name!r}; pass the wrapped one")
        if present is not None and tuner in present.attached:
            raise StepError(f"adapter {tuner.name!r} is attached to this trainer already")
        refuse_fixed(tuner.model, "attaching")
        if is_attached(tuner):
            raise StepError(
                f"adapter {tuner.name!r} is already driven by an optimizer (tunerkit.attach, or a Trainer that is "
                "training now); attach only one of them"
            )
    refuse_liger(trainer, tuners[0].model)
    refuse_unfit(trainer, tuners)
    leave_out_(trainer, tuners)  # which refuses before it changes anything, too
    settle_(trainer, tuners)
    if present is not None:
        present.add(tuners, total_steps)
        return
    if data_parallel is None and sends_merged(trainer):
        data_parallel = False  # a process group may be vLLM's, which opens one beside the trainer
    callback = StepCallback(trainer, tuners, total_steps, data_parallel)
    trainer.add_callback(callback)
    take_over_(trainer, callback)


class StepCallback(TrainerCallback):
    """Drives adapters while ``trainer.train()`` runs, because the optimizer and the total steps only exist then.

    Attributes:
        attached: All tuners that were attached, including those of adapters that were deleted later.
        resumed: The checkpoint that this call of ``train`` resumes from, if the checkpoint has adapters.
    """

    def __init__(
        self, trainer: Trainer, tuners: list[Tuner], total_steps: int | None, data_parallel: bool | None = None
    ) -> None:
        self.trainer = trainer
        self.attached = list(tuners)
        self.total_steps = total_steps
        self.data_parallel = data_parallel
        self.resumed: Path | None = None
        self._drive: Callable[[Sequence[Tuner]], object] | None = None

    @property
    def tuners(self) -> list[Tuner]:
        """The tuners that are still in their model: adapters may be deleted or unwrapped at any time."""
        return [tuner for tuner in self.attached if tunerkit.adapters(tuner.model).get(tuner.name) is tuner]

    def add(self, tuners: list[Tuner], total_steps: int | None) -> None:
        """Drive more adapters, immediately if training is running. The total steps must be the same for all."""
        if total_steps is not None and self.total_steps not in (None, total_steps):
            raise StepError(f"this trainer was attached with total_steps={self.total_steps}, now with {total_steps}")
        if self._drive is not None:
            self._drive(tuners)
        self.total_steps = total_steps if self.total_steps is None else self.total_steps
        self.attached.extend(tuners)

    def release(self) -> None:
        """Detach the adapters after training, so that another optimizer or Trainer may drive them."""
        for tuner in self.attached:
            detach(tuner)
        self.resumed = self._drive = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.total_steps is not None and self.total_steps != state.max_steps:
            raise StepError(
                f"attach was given total_steps={self.total_steps}, but the trainer trains {state.max_steps} steps; "
                "leave total_steps out, because the trainer knows it"
            )
        self._refuse_other_model()
        for tuner in self.tuners:
            # With auto_find_batch_size one call of train may start several times; each start begins at step 0.
            detach(tuner)
        # global_step rises after the optimizer's step, and also for skipped steps. The schedule follows it.
        clock = functools.partial(_step_in_progress, state)
        refuse_other_shards(self.trainer)
        model: Any = self.trainer.model
        engine, candidate = engine_for(self.tuners, model, kwargs["optimizer"], self.data_parallel)
        self._drive = functools.partial(
            drive, candidate=candidate, total_steps=state.max_steps, clock=clock, engine=engine
        )
        self._drive(self.tuners)
        warn_of_base_changes(self.tuners, again=False)
        if self.resumed is not None:
            if runs_deepspeed(self.trainer):
                # DeepSpeed's files hold the trained parameters. This restores the rest, and compares the base.
                restore_weights_(self.tuners, self.resumed)
            load_states(self.tuners, self.resumed)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for tuner in self.tuners:
            if tuner.steps == 0 and state.global_step > 0:
                warnings.warn(
                    f"training ended after {state.global_step} steps, and adapter {tuner.name!r} took part in none: it "
                    "was never active, or the optimizer's step hooks never fired. Its ranks did not change",
                    TunerkitWarning,
                    stacklevel=2,
                )
            warn_of_unspent_schedule(tuner)

    def _refuse_other_model(self) -> None:
        """Reject a model without the attached adapters: with ``model_init``, each call of train builds a new model."""
        model = self.trainer.model
        held = tunerkit.adapters(model).values() if isinstance(model, torch.nn.Module) else ()
        gone = [tuner.name for tuner in self.tuners if tuner not in held]
        if gone:
            raise StepError(
                f"adapter {gone[0]!r} is not in the model that is about to be trained: with model_init, a trainer "
                "builds a new model; give the Trainer the wrapped model instead"
            )


def _step_in_progress(state: TrainerState) -> int:
    return int(state.global_step) + 1
