"""Attach adapters to a transformers Trainer: its own loop, its total steps, its global step as the clock."""

import functools
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tunerkit import steps
from tunerkit.errors import StepError
from tunerkit.tuner import Tuner, tuners_of


def attach_trainer(tuners: list[Tuner], trainer: Trainer, total_steps: int | None) -> None:
    """Add the callback that attaches ``tuners`` to the trainer's optimizer when training begins."""
    held = tuners_of(trainer.model).values() if trainer.model is not None else ()
    for tuner in tuners:
        if tuner not in held:
            raise StepError(f"the trainer trains another model than the one that adapter {tuner.name!r} is in")
        if steps.is_attached(tuner):
            raise StepError(f"adapter {tuner.name!r} is attached to an optimizer already; attach one or the other")
        if any(isinstance(cb, StepCallback) and tuner in cb.tuners for cb in trainer.callback_handler.callbacks):
            raise StepError(f"adapter {tuner.name!r} is attached to this trainer already")
    trainer.add_callback(StepCallback(tuners, total_steps))


class StepCallback(TrainerCallback):
    """Attaches when ``trainer.train()`` begins, where optimizer and total steps exist; detaches at its end."""

    def __init__(self, tuners: list[Tuner], total_steps: int | None) -> None:
        self.tuners = tuners
        self.total_steps = total_steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = steps.find_optimizer(kwargs["optimizer"])
        if self.total_steps is not None and self.total_steps != state.max_steps:
            raise StepError(
                f"attach says total_steps={self.total_steps}, the trainer trains {state.max_steps} steps; "
                "leave total_steps out, the trainer knows it"
            )
        for tuner in self.tuners:
            # A run that an exception ended never reached its end: begin anew.
            steps.detach(tuner)
        # global_step rises after the optimizer's step, and for skipped steps too: the schedule follows it.
        clock = functools.partial(_step_in_progress, state)
        steps.drive(self.tuners, optimizer, total_steps=state.max_steps, clock=clock)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for tuner in self.tuners:
            steps.detach(tuner)


def _step_in_progress(state: TrainerState) -> int:
    return int(state.global_step) + 1
