"""``tunerkit train``: read, load, wrap, train, evaluate, and write the output folder."""

import os
import time
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import attrs
from rich.console import Console

import tunerkit
from tunerkit import RankChange, TunerkitError
from tunerkit.cli import assets, outputs
from tunerkit.cli.demo import demo_of
from tunerkit.cli.recipes.recipe import DEFAULT_METHOD, Recipe, to_mapping, with_full_paths, with_home
from tunerkit.cli.running import output
from tunerkit.cli.running.adapting import adapt, head_labels, order_note
from tunerkit.cli.running.arguments import trainer_arguments
from tunerkit.cli.running.baseline import NoBaselineError, head_alone
from tunerkit.cli.running.building import build_trainer
from tunerkit.cli.running.callbacks import Watching, refuse_nonfinite
from tunerkit.cli.running.data import Data, prepare_data
from tunerkit.cli.running.describing import conclude, describe, tell
from tunerkit.cli.running.learning import Learning, Reached, advice, below_baseline, judged, reached
from tunerkit.cli.running.record import (
    Trained,
    adapter_facts,
    environment,
    finite,
    model_facts,
    write_json,
    write_record,
    write_report,
)
from tunerkit.cli.running.restarting import MOST, SLOWER, LostError, read_restarts, roll_back, slower
from tunerkit.cli.running.session import Session
from tunerkit.cli.running.starting import explaining, keep_start, start_of
from tunerkit.cli.running.telling import say, telling_warnings
from tunerkit.cli.tasks.base import Task
from tunerkit.cli.tasks.generating import are_conversations
from tunerkit.cli.tasks.texts import labels_of, short_to_long
from tunerkit.errors import shown
from tunerkit.integrations.output_folder import VERSION
from tunerkit.integrations.pretrained import Pretrained, load_pretrained, quiet
from tunerkit.integrations.quantising import bytes_of


def run(
    recipe: Recipe, console: Console, *, resume: bool = False, overwrite: bool = False, dry_run: bool = False
) -> None:
    """Run a recipe, print the results, and write the files into its output folder.

    Args:
        recipe: The recipe.
        console: Where progress and results are printed.
        resume: Whether to go on from the folder's newest checkpoint.
        overwrite: Whether to replace an earlier run in the folder.
        dry_run: Whether to stop before training, and before anything is written.

    Raises:
        TunerkitError: Something in the recipe, the data, the model or the folder does not fit.
        KeyboardInterrupt: Ctrl-C ended the training, after a checkpoint.
    """
    _refuse_processes(os.environ)
    recipe = with_home(recipe)
    if recipe.from_adapter is None and recipe.method is None:
        recipe = attrs.evolve(recipe, method=DEFAULT_METHOD)
    folder = Path(recipe.out)
    output.check(folder, recipe, resume=resume, overwrite=overwrite)
    if recipe.from_adapter is None and recipe.method is not None:
        tunerkit.structure(recipe.method, recipe.config)  # report a typo before creating or downloading anything
    if not dry_run:
        outputs.prepare(folder)
    quiet()
    with telling_warnings(console):
        task, data = prepare_data(recipe, console)
        session = prepare(recipe, task, data, console, resume=resume)
    describe(session, console)
    if dry_run:
        say(console, "dry run: nothing was trained and nothing was written")
        return
    kept = with_full_paths(attrs.evolve(recipe, task=task.name, method=session.tuner.method))
    output.begin(folder, kept, resume=resume)
    if session.start is not None and not resume:
        keep_start(session.start, session.loaded.model, folder)
    before = task.samples(session.loaded, data.held_out)
    session, trained = train_with_restarts(session, console, resume=resume)
    tunerkit.save(session.loaded.model, folder)  # at once: what follows only describes it
    session.loaded.processor.save_pretrained(folder)
    record = record_of(session, trained, kept, before)
    write_json(folder / "environment.json", record["environment"])
    write_record(folder, record)  # last, because it says that the run has ended
    tell(session, trained, console)
    for sample in record.get("samples", ()):
        for name, text in sample.items():
            say(console, f"{name}: {shown(text)}")
    try:
        if recipe.baseline and (baseline := compare(session, trained, console)) is not None:
            record |= _beside(session, trained, baseline)
            write_record(folder, record)
    finally:  # Ctrl-C stops the baseline, and the report is then without it
        conclude(recipe, record, console)
        write_report(folder, record, console)
    has_text = any(each.name in ("text", "prompt", "source") for each in task.columns)
    say(console, f"written to {folder}; try: tunerkit predict {folder} --{'text TEXT' if has_text else 'data FILE'}")
    say(console, f"report: {folder / 'report.html'}")


def _refuse_processes(environment: Mapping[str, str]) -> None:
    """Raise `TunerkitError` if the command was started as one of several processes, such as by torchrun."""
    count = environment.get("WORLD_SIZE", "1")
    if count.isdecimal() and int(count) > 1:
        raise TunerkitError(
            f"WORLD_SIZE is {count}, and the command trains in one process; call it without torchrun, or train in a "
            "script with tunerkit.attach"
        )


def record_of(session: Session, trained: Trained, kept: Recipe, before: list[dict[str, str]]) -> dict[str, Any]:
    """The record of a run. ``kept`` is the recipe with full paths, and ``before`` the samples before training."""
    task, data, loaded = session.task, session.data, session.loaded
    record: dict[str, Any] = {
        "version": VERSION,
        "task": task.name,
        "model": model_facts(loaded, session.trainer.args.seed),
        "data": {"train": data.source, "eval": data.held_out_source},
        "rows": {"train": len(data.train), "eval": len(data.held_out)},
        "columns": list(data.train[0]),
        "labels": list(data.labels),
        "metrics": dict(trained.metrics),
        "main_metric": task.main_metric,
        "greater_is_better": task.greater_is_better,
        "logs": [dict(entry) for entry in trained.logs],
        "seconds": dict(trained.seconds),
        "device": str(loaded.model.device),
        "max_length": task.limit,
        **adapter_facts(session.tuner, trained),
        "recipe": to_mapping(kept),
        "environment": environment(session.tuner.method),
    }
    if session.start is not None:  # as in the copy of the adapter, from which a resumed run starts
        record["config"] = tunerkit.unstructure(session.tuner.config.settled())
    if (conversations := are_conversations(task, data.train)) is not None:
        record["conversations"] = conversations
    if restarts := read_restarts(Path(session.recipe.out)):
        record["restarts"] = [attrs.asdict(restart) for restart in restarts]
    if trained.problems:
        record["problems"] = [attrs.asdict(problem) for problem in trained.problems]
    if trained.confusion is not None:
        record["confusion"] = [list(row) for row in trained.confusion]
    if after := task.samples(loaded, data.held_out):
        record["samples"] = [
            {"prompt": old["prompt"], "before": old["answer"], "after": new["answer"]}
            for old, new in zip(before, after, strict=True)
        ]
    plain: dict[str, Any] = finite(record)
    return plain


def _beside(session: Session, trained: Trained, baseline: Mapping[str, Any]) -> dict[str, Any]:
    """What a baseline adds to the record: itself, and that it is better, if it is."""
    task = session.task
    own, other = trained.metrics[task.main_metric], baseline["metrics"][task.main_metric]
    tried = session.watching.learning.advice if session.watching.learning is not None else ""
    worse = below_baseline(task.main_metric, own, other, is_better_high=task.greater_is_better, advice=tried)
    found: dict[str, Any] = {"baseline": finite(baseline)}
    if worse is not None:
        found["problems"] = [attrs.asdict(problem) for problem in (*trained.problems, worse)]
    return found


def prepare(recipe: Recipe, task: Task, data: Data, console: Console, *, resume: bool = False) -> Session:
    """Load the model, put the adapter into it, encode the rows, and build the trainer."""
    start = start_of(recipe, resume=resume)
    labels, ordered = head_labels(start, task, data)
    demo = {} if recipe.data is not None else demo_of(task.name, "data").training
    arguments = trainer_arguments(task, {**demo, **recipe.training}, Path(recipe.out), has_eval=bool(data.held_out))
    restarts = read_restarts(Path(recipe.out)) if resume else ()
    arguments.learning_rate *= SLOWER ** len(restarts)
    seed = arguments.seed
    source = recipe.model
    if source is None:
        source = str(demo_of(task.name, "model").model(assets.cache_folder(), lambda text: say(console, text)))
    revision = start.revision if start is not None and start.model == source else None
    loaded = load_pretrained(
        task.name,
        source,
        labels=labels,
        ordered=ordered,
        revision=revision,
        dtype=recipe.dtype,
        seed=seed,
        quantisation=recipe.quantisation,
    )
    if recipe.quantisation is not None:
        own, dense = bytes_of(loaded.model)
        say(
            console, f"base: quantised as {recipe.quantisation}, {own / 2**20:,.0f} MiB instead of {dense / 2**20:,.0f}"
        )
    if data.labels:
        data = attrs.evolve(data, labels=labels_of(loaded))
    tuner = adapt(loaded, recipe, task, start, seed=seed)
    if note := order_note(start, tuner, data.labels):
        say(console, note)
    kind, _ = task.trainer_classes()
    guess = None if arguments.label_smoothing_factor else task.guess_loss(data.train)
    usual = task.defaults["learning_rate"]
    tried = advice(arguments.learning_rate, arguments.warmup_steps, usual=usual)
    watching = Watching(
        console,
        tuner,
        tuner.method,
        follow=partial(Learning, guess, tried, usual),
        slower=partial(slower, restarts),
        may_restart=recipe.on_collapse == "restart" and len(restarts) < MOST,
    )
    trainer = build_trainer(
        kind,
        arguments,
        model=loaded.model,
        train_dataset=task.encode(data.train, loaded),
        eval_dataset=_held_out(task, data, loaded),
        processing_class=loaded.processor,
        callbacks=[watching],
        **task.trainer_settings(loaded),
    )
    tunerkit.attach(loaded.model, trainer)
    return Session(recipe, task, data, loaded, tuner, trainer, watching, start)


def _held_out(task: Task, data: Data, loaded: Pretrained) -> Any:
    """The held-out rows as the trainer takes them; None without any."""
    if not data.held_out:
        return None
    encoded = task.encode(data.held_out, loaded)
    return encoded.select(short_to_long(encoded)) if "input_ids" in (encoded.column_names or ()) else encoded


def train_with_restarts(session: Session, console: Console, *, resume: bool) -> tuple[Session, Trained]:
    """Train and evaluate, and do so again from the last good checkpoint at half the rate if the loss is lost."""
    recipe, folder = session.recipe, Path(session.recipe.out)
    while True:
        try:
            return session, train(session, console, resume=resume)
        except LostError as lost:
            restart = roll_back(folder, lost, session.trainer.args.learning_rate)
        finally:
            session.watching.close()
        say(console, f"note: {restart}")
        for tensor in (*session.loaded.model.parameters(), *session.loaded.model.buffers()):
            tensor.data = tensor.new_empty(0)  # so that there is room for the next model; a quantised one has no `to`
        task, data, resume = session.task, session.data, True
        with warnings.catch_warnings(action="ignore"):  # which were printed before
            session = prepare(recipe, task, data, console, resume=resume)


def train(session: Session, console: Console, *, resume: bool) -> Trained:
    """Train and evaluate."""
    tuner, trainer = session.tuner, session.trainer
    start = RankChange(step=0, budget=tuner.budget() if tuner.ranks() else 0, ranks=tuner.ranks())
    began = time.perf_counter()
    with session.watching.interruptible(), telling_warnings(console), explaining(session.start):
        trainer.train(
            resume_from_checkpoint=True if resume and output.has_checkpoint(Path(session.recipe.out)) else None
        )
    if session.watching.interrupted:
        raise KeyboardInterrupt
    learning = session.watching.learning
    assert learning is not None  # of the training that has just ended
    seconds = {"train": time.perf_counter() - began}
    metrics: dict[str, float] = {}
    confusion, found, rows = None, Reached(), len(session.data.held_out)
    if session.data.held_out:
        began = time.perf_counter()
        results = session.task.evaluate(trainer, trainer.eval_dataset)
        metrics, confusion = results.metrics, results.confusion
        seconds["evaluate"] = time.perf_counter() - began
        when = f"on the held-out rows after {tuner.steps} steps"
        refuse_nonfinite(metrics["loss"], when, trainer.args.learning_rate)
        found = reached(metrics, confusion, session.data.labels, rows=rows, advice=learning.advice)
    problems = judged(learning, found, metrics.get("loss"), continued=session.start is not None)
    return Trained(trainer.state.log_history, start, seconds, metrics, confusion, problems)


def compare(session: Session, trained: Trained, console: Console) -> dict[str, Any] | None:
    """Train the head alone, and print how far the adapter is from it."""
    task, heads = session.task, [place.path for place in session.tuner.copies]
    if not task.has_baseline or len(heads) != 1 or not session.data.held_out:
        say(console, "no baseline: it is for classifiers of which one module, the head, is trained in full")
        return None
    tunerkit.unwrap(session.loaded.model)
    rows = (session.data.train, session.data.held_out)
    folder = Path(session.recipe.out)
    try:
        baseline = head_alone(task, session.loaded, heads, rows, dict(session.recipe.training), console, folder)
    except NoBaselineError as problem:  # the adapter is written already
        say(console, str(problem))
        return None
    own, other = trained.metrics[task.main_metric], baseline["metrics"][task.main_metric]
    say(console, f"head alone: {task.main_metric} {other:.4f} (best of {', '.join(baseline['by_learning_rate'])})")
    say(console, f"{session.tuner.method} is {100 * (own - other):+.1f} points from the head alone")
    return baseline
