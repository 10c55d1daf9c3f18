"""Train a run and evaluate it: from its first step on it replaces an earlier run in its folder."""

import math
import shlex
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import Any

import attrs
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations.integration_utils import TensorBoardCallback

import tunerkit
from tunerkit import TunerkitError
from tunerkit.errors import ConfigError, closest, shown
from tunerkit.paths import few
from tunerkit.plugin import RankChange
from tunerkit_cli import outputs
from tunerkit_cli.folder import CARD, CHECKPOINTS, LOGS, RunFolder
from tunerkit_cli.machine import hardware
from tunerkit_cli.machine.processes import wait
from tunerkit_cli.preparing.session import Session, prepare
from tunerkit_cli.preparing.starting import explaining, keep_start, place_start
from tunerkit_cli.recipes.recipe import Recipe
from tunerkit_cli.running.record import Trained
from tunerkit_cli.tasks.rewards import RewardError
from tunerkit_cli.telling import say, telling_warnings
from tunerkit_cli.watching.callback import DivergedError, LostError, roll_back
from tunerkit_cli.watching.learning import Reached, judged, reached
from tunerkit_transformers.memory_plan import Plan
from tunerkit_transformers.out_of_memory import advice_on, is_out_of_memory


class EvaluationError(TunerkitError):
    """An adapter that has been trained and written could not be evaluated."""


class OutOfMemoryError(TunerkitError):
    """There is not enough memory for a run."""


class Listing(TrainerCallback):
    """Keeps the list of what a run writes into its folder, where it replaces an earlier run at its first step."""

    def __init__(self, folder: RunFolder, begin: Callable[[], None]) -> None:
        self._folder, self._begin = folder, begin
        self.has_begun = self.is_saving = False
        self._before = folder.inside(LOGS)

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.begin()

    def begin(self) -> None:
        """Replace an earlier run, if that has not been done yet."""
        if not self.has_begun:
            self._begin()
            wait()  # for the files of the earlier run to be gone
            self.has_begun = True
            self._note()

    def forget(self) -> None:
        """Remove what a run wrote that was refused before its first step: its loggers' files."""
        if not self.has_begun:
            self._folder.remove(self._logged())

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save:
            self.is_saving = True
            self._note(f"{CHECKPOINTS}/checkpoint-{state.global_step}/")
            wait()  # until it is listed: each process writes a file into it

    on_epoch_end = on_step_end  # which asks for checkpoints too

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        wait()  # for all files
        self.is_saving = False
        self._note(*self._folder.inside(f"{CHECKPOINTS}/checkpoint-{state.global_step}"))

    def _note(self, *paths: str) -> None:
        """List some files beside the loggers' and TRL's card."""
        card = [CARD] if (self._folder / CARD).is_file() else []
        self._folder.note([*paths, *self._logged(), *card])

    def _logged(self) -> frozenset[str]:
        return self._folder.inside(LOGS) - self._before


@contextmanager
def replacing(session: Session, kept: Recipe, *, resume: bool) -> Iterator[Listing]:
    """Inside the block, the training replaces an earlier run at its first step; if it ends before, nothing changes."""
    folder = session.folder
    with outputs.scratch_beside(folder.path, "start") as scratch:
        if session.start is not None and not resume:
            keep_start(session.start, session.loaded.model, scratch, folder)

        earlier = folder.files or frozenset()  # before a logger of the new run writes beside them

        def begin() -> None:
            folder.begin(kept, earlier, resume=resume)
            place_start(scratch, folder)

        listing = Listing(folder, begin)
        session.trainer.add_callback(listing)
        try:
            yield listing
            listing.begin()  # one that is resumed after its last step makes none
        except BaseException as problem:
            listing.forget()
            if listing.is_saving and isinstance(problem, OSError | RuntimeError):  # the latter is torch.save's
                raise outputs.OutputError(
                    f"cannot write a checkpoint into {folder / CHECKPOINTS}: {reason_of(problem)}; free some disk "
                    f"space, and go on with: tunerkit train --out {shlex.quote(str(folder))} --resume"
                ) from problem
            raise


@contextmanager
def refusing_memory(
    folder: RunFolder, plan: Plan | None = None, *, has_begun: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Turn an error of memory into one that says what to change, and how to go on with a run that has begun."""
    try:
        yield
    except (RuntimeError, MemoryError) as problem:
        if not is_out_of_memory(problem):
            raise
        do = "train with --set gradient_checkpointing=true, a smaller --batch-size or --set quantisation=nf4"
        if has_begun() and folder.has_checkpoint:
            saves = plan is not None and plan.checkpointing > 0
            how = " --set gradient_checkpointing=true" if saves else ", where there is more memory"
            do = f"go on with: tunerkit train --out {shlex.quote(str(folder))} --resume{how}"
        raise OutOfMemoryError(f"out of memory: {advice_on(plan)}; {do}") from problem


class RehearsedError(Exception):
    """A training could have begun."""


class Rehearsal(TrainerCallback):
    """Ends a training before its first step, when all that it checks has been checked."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        raise RehearsedError


def rehearse(session: Session, console: Console, *, resume: bool) -> None:
    """Begin the training and end it before its first step, so that all is checked that the training checks."""
    session.trainer.remove_callback(session.watching)  # it would draw its bar
    session.trainer.add_callback(Rehearsal())
    with suppress(RehearsedError):
        _train(session, console, resume=resume)


def _train(session: Session, console: Console, *, resume: bool) -> None:
    trainer, watching = session.trainer, session.watching
    with closing(watching), watching.interruptible(), telling_warnings(console), explaining(session.start):
        try:
            trainer.train(resume_from_checkpoint=True if resume and session.folder.has_checkpoint else None)
        except RewardError as problem:
            out, step = shlex.quote(str(session.folder)), trainer.state.global_step
            do = f"correct it, and go on with: tunerkit train --out {out} --resume --allow-code"
            if not session.folder.has_checkpoint:
                do = "no checkpoint was written yet; correct it, and train again"
            raise RewardError(f"{problem}, after step {step} of {trainer.state.max_steps}; {do}") from problem
        finally:
            for each in trainer.callback_handler.callbacks:
                if isinstance(each, TensorBoardCallback) and each.tb_writer is not None:
                    each.tb_writer.close()  # of a training that has ended early: its thread would write on


def train_with_restarts(
    session: Session, listing: Listing, console: Console, *, resume: bool
) -> tuple[Session, Trained]:
    """Train, if the loss is lost again from the last good checkpoint, slower; return the session that ended."""
    folder = session.folder
    while True:
        try:
            return session, train(session, console, resume=resume)
        except LostError as lost:
            listing.is_saving = False
            restart = roll_back(folder, lost, session.trainer.args.learning_rate)
        if session.watching.interrupted:
            raise KeyboardInterrupt
        say(console, f"note: {restart}")
        for tensor in (*session.loaded.model.parameters(), *session.loaded.model.buffers()):
            tensor.data = tensor.new_empty(0)  # so that there is room for the next model; a quantised one has no `to`
        resume = True
        # As the recipe in the folder says it: without the key, an earlier version would have begun the run.
        recipe = attrs.evolve(session.recipe, train_on_prompts=session.task.trains_on_prompts)
        if session.start is None:  # no checkpoint may be left that says what the method's defaults were
            recipe = attrs.evolve(recipe, config=tunerkit.unstructure(session.tuner.config.settled()))
        with warnings.catch_warnings(action="ignore"):  # which were printed before
            session = prepare(recipe, session.task, session.data, console, resume=True)
        session.trainer.add_callback(listing)


def train(session: Session, console: Console, *, resume: bool) -> Trained:
    """Train."""
    tuner, trainer = session.tuner, session.trainer
    start = RankChange(step=0, budget=tuner.budget() if tuner.ranks() else 0, ranks=tuner.ranks())
    began = time.perf_counter()
    whole, loop = trainer.evaluate, trainer.evaluation_loop
    trainer.evaluate = partial(_evaluate_meanwhile, session, console, whole)
    if str(trainer.args.metric_for_best_model).removeprefix("eval_") in session.measure.functions:
        trainer.evaluation_loop = partial(_measure_meanwhile, session, loop)
    _train(session, console, resume=resume)
    trainer.evaluate, trainer.evaluation_loop = whole, loop
    if session.watching.interrupted:
        raise KeyboardInterrupt
    state, patience = trainer.state, session.recipe.early_stopping_patience
    if patience is not None and state.global_step < state.max_steps:
        best = f"the best is step {state.best_global_step}, whose checkpoint is kept"
        say(console, f"stopped early, after step {state.global_step} of {state.max_steps}: {best}")
    problems = judged(session.watching.learning, Reached(), None, continued=session.start is not None)
    return Trained(trainer.state.log_history, start, {"train": time.perf_counter() - began}, {}, None, problems)


def _evaluate_meanwhile(
    session: Session, console: Console, call: Callable[..., dict[str, float]], *arguments: Any, **options: Any
) -> dict[str, float]:
    """Evaluate in a training, which goes on if that fails, unless it chooses the best checkpoint by the result."""
    state, folder, best = session.trainer.state, session.folder, session.trainer.args.metric_for_best_model
    try:
        found = call(*arguments, **options)
        names = [*session.measure.functions, *(name.removeprefix("eval_") for name in found)]
        if best is not None and best.removeprefix("eval_") not in names:
            if state.global_step:
                folder.save(session.loaded)  # what has been trained is kept
            names = [name for name in names if not name.endswith(("runtime", "per_second", "_time", "epoch"))]
            said = closest(best.removeprefix("eval_"), names) or f"; there are {few(names, shown=20)}"
            raise ConfigError([f"training.metric_for_best_model: no evaluation has {shown(best)}{said}"])
        return found
    except TunerkitError:
        raise
    except Exception as problem:  # of a library, of a metric: whatever it is, the training is worth more
        reason = f"the evaluation after step {state.global_step} of {state.max_steps} failed: {reason_of(problem)}"
        if best is None:
            say(console, f"{reason}; the training goes on")
            return {}
        folder.save(session.loaded)
        raise EvaluationError(
            f"{reason}; the training needs its result (metric_for_best_model), so it has stopped. The adapter as it is "
            f"now is in {folder}, for tunerkit.load; leave metric_for_best_model out to train to the end"
        ) from problem


def _measure_meanwhile(session: Session, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Evaluate, and add the recipe's metrics, which the trainer then logs, and chooses the best checkpoint by."""
    found = call(*arguments, **options)
    found.metrics.update({f"eval_{name}": value for name, value in measured(session).items()})
    return found


def measured(session: Session) -> dict[str, float]:
    """The recipe's metrics of the model as it is."""
    size = session.trainer.args.per_device_eval_batch_size
    with hardware.computing_in(session.precision, session.loaded.model.device):
        return session.measure.of(session.task, session.loaded, batch_size=size)


def reason_of(problem: Exception) -> str:
    """What an exception says, in one line."""
    return " ".join(str(problem).split()) or type(problem).__name__


def evaluate(session: Session, trained: Trained) -> Trained:
    """Evaluate on the held-out rows, if there are some, and judge whether the run learned."""
    if not session.data.held_out:
        return trained
    began = time.perf_counter()
    results = session.task.evaluate(session.trainer, session.trainer.eval_dataset)
    metrics, took = results.metrics, time.perf_counter() - began if results.seconds is None else results.seconds
    if not math.isfinite(metrics["loss"]):
        raise DivergedError(
            f"the loss is {metrics['loss']} on the held-out rows after {session.tuner.steps} steps; train with a lower "
            f"--lr than {session.trainer.args.learning_rate:g}, or check the data and the model"
        )
    rows = session.rows("eval")
    found = reached(metrics, results.confusion, session.data.labels, rows=rows, advice=session.watching.learning.advice)
    return attrs.evolve(
        trained,
        seconds={**trained.seconds, "evaluate": took},
        metrics=metrics,
        confusion=results.confusion,
        right=results.right,
        problems=judged(session.watching.learning, found, metrics["loss"], continued=session.start is not None),
    )
