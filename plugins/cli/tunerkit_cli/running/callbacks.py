"""What the trainer tells the command while it trains: progress, a loss that is not finite or lost, and Ctrl-C."""

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.data import BatchSampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from tunerkit import Tuner, TunerkitError
from tunerkit_cli.report.record import Problem
from tunerkit_cli.running import written
from tunerkit_cli.running.learning import Learning
from tunerkit_cli.running.restarting import LostError
from tunerkit_cli.running.telling import say
from tunerkit_cli.running.written import CHECKPOINTS, LOGS


class DivergedError(TunerkitError):
    """The loss is not finite, so the weights are useless."""


class Watching(TrainerCallback):
    """Shows the progress, in a terminal as a bar and elsewhere as a line for each log entry, and stops at NaN.

    Ctrl-C ends the training at the end of the step, with a checkpoint; ``interrupted`` says so afterwards. A second one
    stops at once. What ``follow`` returns, given the number of steps, is ``learning``, which judges the losses. Without
    it, any losses are fine, and they are not printed. ``slower``, given the step from which a training is resumed, says
    by how much the checkpoint's learning rate is multiplied. If the run may be restarted (``may_restart``), a loss that
    is lost raises `LostError`.
    """

    def __init__(
        self,
        console: Console,
        tuner: Tuner | None,
        title: str,
        *,
        follow: Callable[[int], Learning] | None = None,
        slower: Callable[[int], float] = lambda step: 1.0,
        may_restart: bool = False,
    ) -> None:
        self.console, self.tuner, self.title, self.follow = console, tuner, title, follow
        self.slower, self.may_restart = slower, may_restart
        self.learning: Learning | None = None
        self.interrupted = False
        self._printed = 0  # tenths of the training for which a line was printed
        self._bar: Progress | None = None
        self._task: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.console.is_terminal:
            columns = [
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
            ]
            self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console)
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=state.max_steps, completed=state.global_step, facts="")
        self.learning = None if self.follow is None else self.follow(state.max_steps)
        for entry in state.log_history:  # of a run that is resumed
            self._judge(entry)
        if (factor := self.slower(state.global_step)) != 1:
            slow_down_(kwargs["optimizer"], kwargs["lr_scheduler"], factor)

    def _judge(self, entry: dict[str, Any]) -> None:
        if self.learning is not None and (sentence := self.learning.add(entry)) is not None:
            say(self.console, f"note: {sentence}")
            if self.may_restart and self.learning.problem is not None:
                raise LostError(self.learning.problem, self.learning.good)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)
        if self.interrupted:
            say(self.console, "interrupted: writing a checkpoint (Ctrl-C again stops at once)")
            control.should_save = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.interrupted and not _is_whole(state.epoch):
            control.should_evaluate = False  # the epoch's evaluation comes when it is resumed

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        entry = logs or {}
        for name in ("loss", "eval_loss"):
            if self.follow is not None and name in entry and not math.isfinite(entry[name]):
                rates = [each["learning_rate"] for each in state.log_history if "learning_rate" in each]
                rate = f" (learning rate {rates[-1]:.3g})" if rates else ""
                when = f"at step {state.global_step} of {state.max_steps}{rate}"
                if self.may_restart and self.learning is not None:
                    problem = Problem(
                        "diverged", f"the loss is {entry[name]} {when}", state.global_step, rates[-1] if rates else None
                    )
                    raise LostError(problem, self.learning.good)
                refuse_nonfinite(entry[name], when, args.learning_rate)
        self._judge({**entry, "step": state.global_step})
        facts = _facts(entry, self.tuner)
        if not facts:
            return
        if self._bar is not None:
            self._bar.update(self._task, facts=facts)
        elif self.follow is not None and ("eval_loss" in entry or self._is_due(state)):
            text = f"{self.title}: step {state.global_step}/{state.max_steps}  {facts}"
            say(self.console, text)

    def _is_due(self, state: TrainerState) -> bool:
        """Whether another tenth of the training has passed since the last line: logs in a pipe stay short."""
        tenth = 10 * state.global_step // max(state.max_steps, 1)
        due, self._printed = tenth > self._printed, max(tenth, self._printed)
        return due

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop drawing the bar, which must not outlive an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside the block, the first Ctrl-C only sets ``interrupted``."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: FrameType | None) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            self.close()


class RehearsedError(Exception):
    """A training could have begun."""


class Rehearsal(TrainerCallback):
    """Ends a training before its first step, when all that it checks has been checked."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        raise RehearsedError


class Resumable(TrainerCallback):
    """Lets a resumed training see the batches, the random numbers and the logs of one that was not interrupted.

    Batches by length are drawn by the seed and the epoch alone. By themselves they depend on all random numbers drawn
    before the epoch, dropout's too. And a checkpoint at the end of an epoch is written after the epoch's evaluation,
    which it would lack otherwise. An epoch that is resumed after its evaluation is not evaluated again.
    """

    def __init__(self) -> None:
        self._is_due = False  # whether a checkpoint waits for the end of the epoch

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        batches = kwargs["train_dataloader"].batch_sampler
        if isinstance(batches, BatchSampler) and isinstance(batches.sampler, LengthGroupedSampler):
            seed = args.seed if args.data_seed is None else args.data_seed
            batches.sampler.lengths = batches.sampler.lengths[:]  # a column is read from its table for each row
            batches.sampler.generator = torch.Generator().manual_seed(seed + int(state.epoch or 0))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save and _is_whole(state.epoch):
            control.should_save, self._is_due = False, True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_save, self._is_due = control.should_save or self._is_due, False
        if any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history):
            control.should_evaluate = False


class Listing(TrainerCallback):
    """Keeps the list of what a run writes into its folder.

    An earlier run in the folder is replaced once the first step is made: one that is refused before loses nothing.
    """

    def __init__(self, folder: Path, begin: Callable[[], None]) -> None:
        self._folder, self._begin = folder, begin
        self.has_begun = self.is_saving = False
        self._before = written.files_in(folder, LOGS)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begin()

    def begin(self) -> None:
        """Replace an earlier run, if that has not been done yet."""
        if not self.has_begun:
            self._begin()
            self.has_begun = True
            self._note()

    def forget(self) -> None:
        """Remove what a run wrote that was refused before its first step: its loggers' files."""
        if not self.has_begun:
            written.remove(self._folder, self._logged())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save:
            self.is_saving = True
            self._note(f"{CHECKPOINTS}/checkpoint-{state.global_step}/")

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.on_step_end(args, state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.is_saving = False
        self._note(*written.files_in(self._folder, f"{CHECKPOINTS}/checkpoint-{state.global_step}"))

    def _note(self, *paths: str) -> None:
        written.note(self._folder, [*paths, *self._written()])

    def _logged(self) -> frozenset[str]:
        return written.files_in(self._folder, LOGS) - self._before

    def _written(self) -> set[str]:
        """The loggers' files, and TRL's card."""
        return {*self._logged(), *({written.CARD} if (self._folder / written.CARD).is_file() else ())}


def _is_whole(epoch: float | None) -> bool:
    """Whether the training is at the end of an epoch."""
    return epoch is not None and epoch == int(epoch)


def slow_down_(optimizer: torch.optim.Optimizer, scheduler: Any, factor: float) -> None:
    """Multiply all learning rates, also those that the schedule goes by."""
    for group in optimizer.param_groups:
        for name in ("lr", "initial_lr"):
            if name in group:
                group[name] = factor * group[name]
    if isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler) and hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [factor * rate for rate in scheduler.base_lrs]
        scheduler._last_lr = [factor * rate for rate in scheduler._last_lr]


def refuse_nonfinite(loss: float, when: str, rate: float) -> None:
    """Raise `DivergedError` if ``loss`` is NaN or infinite. ``when`` says which loss it is."""
    if not math.isfinite(loss):
        raise DivergedError(
            f"the loss is {loss} {when}, so training was stopped and no adapter was written; use a lower --lr than "
            f"{rate:g}, or check the data and the model"
        )


def _facts(entry: dict[str, Any], tuner: Tuner | None) -> str:
    shown = [
        f"{name.removeprefix('eval_') if name == 'loss' else name} {entry[name]:.3g}"
        for name in ("loss", "eval_loss", "eval_accuracy")
        if isinstance(entry.get(name), float)
    ]
    if shown and "budget" in entry and tuner is not None:
        shown.append(f"budget {entry['budget']:g}  rank {entry['rank_mean']:.1f}")
    return "  ".join(shown)
