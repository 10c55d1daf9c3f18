"""What follows a training: its progress, Ctrl-C, and losses that are not finite or lost, after which a run restarts."""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from types import FrameType
from typing import Any, Final

import attrs
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState

from tunerkit import TunerkitError
from tunerkit.errors import FileError, shown
from tunerkit.plugin import Tuner
from tunerkit_cli.folder import CHECKPOINTS, RESTARTS, RunFolder
from tunerkit_cli.machine.processes import wait
from tunerkit_cli.report.record import Problem, Restart
from tunerkit_cli.telling import say
from tunerkit_cli.watching.learning import Learning
from tunerkit_transformers.agreement import gathered
from tunerkit_transformers.exact_resuming import is_whole

# A quarter of the rate is as far as the rate alone is likely to be the reason.
MOST: Final = 2
SLOWER: Final = 0.5
SPACING: Final = 60.0  # seconds of training between two checkpoints; to write one takes about as long as a step
_CHECKPOINT: Final = "checkpoint-"


class DivergedError(TunerkitError):
    """The loss is not finite, so the weights are useless."""


class LostError(TunerkitError):
    """A run that may be restarted has collapsed; ``good`` is the last step at which its loss was good."""

    def __init__(self, problem: Problem, good: int) -> None:
        super().__init__(problem.text)
        self.problem, self.good = problem, good


class Watching(TrainerCallback):
    """Shows the progress, in a terminal as a bar and elsewhere as a line for each log entry, and stops at NaN.

    Ctrl-C ends the training at the end of the step, with a checkpoint; ``interrupted`` says so afterwards. A second one
    stops at once. What ``follow`` returns, given the number of steps, is ``learning``, which judges the losses. The
    earlier ``restarts`` of the run slow it down. If it may be restarted (``may_restart``), a loss that is lost raises
    `LostError`. If it ``spaces`` checkpoints, those sooner than `SPACING` after another are left out, but for the last.
    """

    learning: Learning  # once the training has begun

    def __init__(
        self,
        console: Console,
        tuner: Tuner,
        follow: Callable[[int], Learning],
        restarts: Sequence[Restart],
        *,
        may_restart: bool,
        spaces: bool,
    ) -> None:
        self.console, self.tuner, self.follow = console, tuner, follow
        self.restarts, self.may_restart, self.spaces = restarts, may_restart, spaces
        self.interrupted = False
        self._printed = 0  # tenths of the training for which a line was printed
        self._bar: Progress | None = None
        self._task: Any = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.console.is_terminal:
            title, facts = TextColumn("{task.description}"), TextColumn("{task.fields[facts]}")
            times = TimeElapsedColumn(), TimeRemainingColumn()
            self._bar = Progress(title, BarColumn(), MofNCompleteColumn(), facts, *times, console=self.console)
            self._bar.start()
            name, steps = self.tuner.method, state.max_steps
            self._task = self._bar.add_task(name, total=steps, completed=state.global_step, facts="")
        self._saved = time.monotonic()
        self.learning = self.follow(state.max_steps)
        for entry in state.log_history:  # of a run that is resumed
            self._judge(entry)
        if (factor := slower(self.restarts, state.global_step)) != 1:
            slow_down_(kwargs["optimizer"], kwargs["lr_scheduler"], factor)

    def _judge(self, entry: dict[str, Any]) -> None:
        if (sentence := self.learning.add(entry)) is not None:
            say(self.console, f"note: {sentence}")
            if self.may_restart and self.learning.problem is not None:
                raise LostError(self.learning.problem, self.learning.good)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)
        if self.spaces and control.should_save and not control.should_training_stop:
            control.should_save = gathered(time.monotonic() - self._saved >= SPACING)[0]  # by the first one's clock
        if any(gathered(self.interrupted)):  # the processes stop at the same step
            self.interrupted = True
            say(self.console, "interrupted: writing a checkpoint (Ctrl-C again stops at once)")
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saved = time.monotonic()

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if any(gathered(self.interrupted)) and not is_whole(state.epoch):
            control.should_evaluate = False  # the epoch's evaluation comes when it is resumed

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        entry = kwargs.get("logs") or {}
        lost = [entry[name] for name in ("loss", "eval_loss") if name in entry and not math.isfinite(entry[name])]
        if lost:
            rates = [each["learning_rate"] for each in state.log_history if "learning_rate" in each]
            rate = f" (learning rate {rates[-1]:.3g})" if rates else ""
            text = f"the loss is {lost[0]} at step {state.global_step} of {state.max_steps}{rate}"
            if self.may_restart:
                problem = Problem("diverged", text, state.global_step, rates[-1] if rates else None)
                raise LostError(problem, self.learning.good)
            raise DivergedError(
                f"{text}, so training was stopped and no adapter was written; use a lower --lr than "
                f"{args.learning_rate:g}, or check the data and the model"
            )
        self._judge({**entry, "step": state.global_step})
        facts = _facts(entry)
        if not facts:
            return
        if self._bar is not None:
            self._bar.update(self._task, facts=facts)
        elif "eval_loss" in entry or self._is_due(state):
            say(self.console, f"{self.tuner.method}: step {state.global_step}/{state.max_steps}  {facts}")

    def _is_due(self, state: TrainerState) -> bool:
        """Whether another tenth of the training has passed since the last line: logs in a pipe stay short."""
        tenth = 10 * state.global_step // max(state.max_steps, 1)
        due, self._printed = tenth > self._printed, max(tenth, self._printed)
        return due

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


def slow_down_(optimizer: torch.optim.Optimizer, scheduler: Any, factor: float) -> None:
    """Multiply all learning rates, also those that the schedule goes by."""
    for group in optimizer.param_groups:
        for name in ("lr", "initial_lr"):
            if name in group:
                group[name] = factor * group[name]
    if isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler) and hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [factor * rate for rate in scheduler.base_lrs]
        scheduler._last_lr = [factor * rate for rate in scheduler._last_lr]


def _facts(entry: dict[str, Any]) -> str:
    names = ("loss", "eval_loss", "eval_accuracy")
    shown = [f"{name} {entry[name]:.3g}" for name in names if isinstance(entry.get(name), float)]
    if shown and "budget" in entry:
        shown.append(f"budget {entry['budget']:g}  rank {entry['rank_mean']:.1f}")
    return "  ".join(shown)


# --- restarts ---


def read_restarts(folder: RunFolder) -> tuple[Restart, ...]:
    """The restarts of the run in an output folder, the oldest first."""
    file = folder / RESTARTS
    if not file.is_file():
        return ()
    try:
        return tuple(Restart(**each) for each in json.loads(file.read_text(encoding="utf-8"))["restarts"])
    except (OSError, ValueError, TypeError, KeyError) as problem:
        raise FileError(f"{file}: is damaged ({shown(str(problem))}); pass --overwrite to begin again") from problem


def roll_back(folder: RunFolder, lost: LostError, rate: float) -> Restart:
    """Remove the checkpoints after the last good one, and note the restart. ``rate`` is the peak so far."""
    names = {path.name.removeprefix(_CHECKPOINT): path.name for path in (folder / CHECKPOINTS).glob(f"{_CHECKPOINT}*")}
    steps = {int(number): name for number, name in names.items() if number.isdecimal()}
    before = {restart.from_step for restart in read_restarts(folder)}  # never twice from the same checkpoint
    good = max((step for step in steps if step <= lost.good and step not in before), default=0)
    ours = folder.files or ()
    wait()  # all go back to the same step
    for step in sorted(steps, reverse=True):
        if step > good:
            folder.remove(path for path in ours if path.startswith(f"{CHECKPOINTS}/{steps[step]}/"))
    restart = Restart(lost.problem.text, lost.problem.step, good, SLOWER * rate)
    noted = {"restarts": [attrs.asdict(each) for each in (*read_restarts(folder), restart)]}
    folder.write(RESTARTS, noted)  # last: a run that is killed before collapses again
    wait()
    return restart


def slower(restarts: Sequence[Restart], step: int) -> float:
    """By how much a checkpoint's rate is multiplied: once for each restart since, as those remove what is later."""
    since = takewhile(lambda restart: step <= restart.from_step, reversed(restarts))
    return float(SLOWER ** len([*since])) if step else 1.0
