"""``tunerkit train``: read, load, wrap, train, evaluate, and write the output folder."""

import gc
import json
import os
import shlex
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import attrs
from rich.console import Console

import tunerkit
from tunerkit.errors import TunerkitError, shown
from tunerkit_cli import outputs
from tunerkit_cli.folder import ENVIRONMENT, LEFT_OUT, REPORT, RunFolder
from tunerkit_cli.machine import hardware, processes
from tunerkit_cli.preparing import resuming
from tunerkit_cli.preparing.data import Data, prepare_data
from tunerkit_cli.preparing.session import Session, prepare, settled
from tunerkit_cli.preparing.trainer import arguments_of
from tunerkit_cli.recipes.reading import read_recipe
from tunerkit_cli.recipes.recipe import Recipe, as_stated
from tunerkit_cli.report.html import render
from tunerkit_cli.report.scores import is_better_high
from tunerkit_cli.running.baseline import head_alone
from tunerkit_cli.running.describing import conclude, described, tell
from tunerkit_cli.running.record import Trained, finite, record_of, sources_of, without_home
from tunerkit_cli.running.training import (
    EvaluationError,
    evaluate,
    measured,
    reason_of,
    refusing_memory,
    rehearse,
    replacing,
    train_with_restarts,
)
from tunerkit_cli.tasks.base import Task
from tunerkit_cli.tasks.language import SAMPLES
from tunerkit_cli.telling import say, telling_warnings
from tunerkit_cli.watching.learning import below_baseline
from tunerkit_transformers.output_folder import RECORD
from tunerkit_transformers.pretrained import quiet
from tunerkit_transformers.run_folder import read_record


def run(
    recipe: Recipe,
    console: Console,
    *,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    prepared: tuple[Task, Data] | None = None,
    after: Callable[[Session, Trained], None] = lambda session, trained: None,
) -> None:
    """Run a recipe, as `checking.completed` returns it, print the results, and write the output folder.

    ``prepared`` has the rows, if they have been read; ``after`` is called once the adapter is written and evaluated.
    """
    processes.require_group(os.environ)
    if not gc.get_freeze_count():  # a Trainer collects garbage as it begins, and would search all that was imported
        gc.freeze()
    folder = RunFolder(Path(recipe.out))
    claim = outputs.claimed(folder.path, keep=not dry_run) if processes.is_first() else nullcontext()
    with processes.leaving(), claim:
        resuming.check(folder, recipe, resume=resume, overwrite=overwrite)
        if resume and folder.has_ended:  # it was killed before it had its report
            if not dry_run:
                folder.write(REPORT, render(read_record(folder.path)))
            do = "it would get" if dry_run else "it has got"
            say(console, f"the run in {folder} has ended, and had no report: {do} {folder / REPORT}")
            return
        recipe = settled(recipe, folder, resume=resume)
        quiet()
        with telling_warnings(console), refusing_memory(folder):
            # Before recipes said the precision, rows were split in another way.
            by_class = not resume or read_recipe(folder.recipe_file()).precision is not None
            task, data = prepared or prepare_data(recipe, console, by_class=by_class)
            session = prepare(recipe, task, data, console, resume=resume, dry_run=dry_run)
        for line in described(session):
            say(console, line)
        if dry_run:
            rehearse(session, console, resume=resume)
            if session.plan is not None:
                say(console, str(session.plan))
            say(console, "dry run: nothing was trained and nothing was written")
            return
        known: dict[str, Any] = {"task": task.name, "method": session.tuner.method}
        known |= {"training": arguments_of(session.recipe, task), "train_on_prompts": task.trains_on_prompts}
        kept = as_stated(attrs.evolve(session.recipe, **known), folder.path)
        resuming.refuse_processor(folder, session.loaded.processor)
        with (
            replacing(session, kept, resume=resume) as listing,
            refusing_memory(folder, session.plan, has_begun=lambda: resume or listing.has_begun),
        ):
            session, trained = train_with_restarts(session, listing, console, resume=resume)
        folder.save(session.loaded)  # at once: what follows only describes it
        _finish(session, trained, kept, console, after)


def _finish(
    session: Session, trained: Trained, kept: Recipe, console: Console, after: Callable[[Session, Trained], None]
) -> None:
    """Evaluate a trained adapter, and write and print what there is to say of it. Raises `EvaluationError`."""
    recipe, task, folder = session.recipe, session.task, session.folder
    failed: Exception | None = None
    try:
        trained = evaluate(session, trained)
        trained = attrs.evolve(trained, metrics={**trained.metrics, **measured(session)})
    except Exception as problem:  # of a library, of a metric, of the data: whatever it is, the adapter is trained
        failed = problem
    if failed is None:
        after(session, trained)
    count = SAMPLES if recipe.samples is None else recipe.samples  # a run that an earlier version began says nothing
    with hardware.computing_in(session.precision, session.loaded.model.device):
        samples = task.samples(session.loaded, session.data.held_out, count)
    record = record_of(session, trained, kept, samples)
    lines = (json.dumps(each, ensure_ascii=False) + "\n" for each in session.data.left_out)
    listed = without_home(sources_of(session, "".join(lines)))
    if listed:
        folder.write(LEFT_OUT, listed)
    folder.write(ENVIRONMENT, record["environment"])
    folder.write(RECORD, record)  # last, because it says that the run has ended
    if failed is not None:
        folder.write(REPORT, render(record))
        raise EvaluationError(
            f"the adapter is trained and written to {folder}, but it could not be evaluated: "
            f"{reason_of(failed)}; to evaluate it: tunerkit eval {shlex.quote(str(folder))} --data FILE"
        ) from failed
    tell(session, trained, console)
    for sample in record.get("samples", ()):
        for name, text in sample.items():
            say(console, f"{name}: {shown(text)}")
    try:
        if (recipe.baseline or task.base_can) and (found := compare(session, trained, console)):
            record |= found
            folder.write(RECORD, record)
    finally:  # Ctrl-C stops the baseline, and the report is then without it
        conclude(recipe, record, console)
        folder.write(REPORT, render(record))
    has_text = any(each.needed and each.name in ("text", "prompt", "source", "anchor") for each in task.columns)
    say(console, f"written to {folder}; try: tunerkit predict {folder} --{'text TEXT' if has_text else 'data FILE'}")
    say(console, f"report: {folder / REPORT}")


def compare(session: Session, trained: Trained, console: Console) -> dict[str, Any]:
    """Evaluate a baseline, print how far the adapter is from it, and return what that adds to the record."""
    task, name = session.task, "base" if session.task.base_can else "head"
    if (baseline := (_base_alone if task.base_can else _head_alone)(session, console)) is None:
        return {}
    metric = task.main_metric
    own, other = trained.metrics[metric], baseline["metrics"][metric]
    say(console, f"{name} alone: {metric} {other:.4f}")
    say(console, f"{session.tuner.method} is {100 * (own - other):+.1f} points from the {name} alone")
    tried = session.watching.learning.advice
    worse = below_baseline(metric, own, other, name=name, is_better_high=is_better_high(metric), advice=tried)
    problems = [attrs.asdict(problem) for problem in (*trained.problems, *([] if worse is None else [worse]))]
    return {"baseline": finite(baseline), **({"problems": problems} if problems else {})}


def _head_alone(session: Session, console: Console) -> dict[str, Any] | None:
    """Fit the head on what the base computes without the adapter; None if there is no head alone, which is said."""
    task, trainer, heads = session.task, session.trainer, [place.path for place in session.tuner.copies]
    if not task.has_baseline or len(heads) != 1 or not session.data.held_out:
        say(console, "no baseline: it is for classifiers of which one module, the head, is trained in full")
        return None
    tunerkit.unwrap(session.loaded.model)
    try:
        return head_alone(task, session.loaded, heads[0], (trainer.train_dataset, trainer.eval_dataset))
    except TunerkitError as problem:  # the adapter is written already
        say(console, str(problem))
        return None


def _base_alone(session: Session, console: Console) -> dict[str, Any] | None:
    """Evaluate a base that can do the task, without the adapter; None without held-out rows."""
    if not session.data.held_out:
        return None
    with tunerkit.disabled(session.loaded.model):
        metrics = session.task.evaluate(session.trainer, session.trainer.eval_dataset).metrics
    return {"what": "the base alone, without the adapter", "metrics": metrics}
