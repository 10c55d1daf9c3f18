"""``tunerkit train``: read, load, wrap, train, evaluate, and write the output folder."""

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
import torch
from rich.console import Console

import tunerkit
from tunerkit import RankChange, TunerkitError
from tunerkit.cli import assets, outputs
from tunerkit.cli.demo import demo_of
from tunerkit.cli.recipes.reading import read_recipe
from tunerkit.cli.recipes.recipe import (
    DEFAULT_METHOD,
    Recipe,
    to_mapping,
    with_full_paths,
    with_home,
    with_precision,
)
from tunerkit.cli.running import hardware, output
from tunerkit.cli.running.adapting import adapt, head_labels, order_note
from tunerkit.cli.running.arguments import trainer_arguments
from tunerkit.cli.running.baseline import NoBaselineError, head_alone
from tunerkit.cli.running.building import refuse_untrainable
from tunerkit.cli.running.callbacks import Rehearsal, RehearsedError, Watching, refuse_nonfinite
from tunerkit.cli.running.data import Data, prepare_data
from tunerkit.cli.running.describing import describe, tell
from tunerkit.cli.running.fitting import build_fitted, cut_at_positions_
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
from tunerkit.cli.running.session import Session
from tunerkit.cli.running.starting import explaining, keep_start, start_of
from tunerkit.cli.running.telling import say, telling_warnings
from tunerkit.cli.tasks.base import Task
from tunerkit.cli.tasks.causal_lm import CausalLm, settle_prompts_
from tunerkit.cli.tasks.generating import GenerationTask, are_conversations
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
    recipe = with_precision(with_home(recipe))
    if recipe.from_adapter is None and recipe.method is None:
        recipe = attrs.evolve(recipe, method=DEFAULT_METHOD)
    folder = Path(recipe.out)
    output.check(folder, recipe, resume=resume, overwrite=overwrite)
    recipe = attrs.evolve(recipe, precision=_precision(recipe, folder, resume=resume))
    if recipe.from_adapter is None and recipe.method is not None:
        tunerkit.structure(recipe.method, recipe.config)  # report a typo before creating or downloading anything
    if resume:  # without the key, an earlier version wrote the recipe
        prompts = read_recipe(output.recipe_file(folder)).train_on_prompts
        recipe = attrs.evolve(recipe, train_on_prompts=prompts)
    outputs.require_writable(folder) if dry_run else outputs.prepare(folder)
    quiet()
    with telling_warnings(console):
        task, data = prepare_data(recipe, console)
        session = prepare(recipe, task, data, console, resume=resume, dry_run=dry_run)
    describe(session, console)
    if dry_run:
        rehearse(session, console, resume=resume)
        say(console, "dry run: nothing was trained and nothing was written")
        return
    settled: dict[str, Any] = {
        "task": task.name,
        "method": session.tuner.method,
        "train_on_prompts": task.trains_on_prompts,
    }
    kept = with_full_paths(attrs.evolve(recipe, **settled))
    output.begin(folder, kept, resume=resume)
    if session.start is not None and not resume:
        keep_start(session.start, session.loaded.model, folder)
    with hardware.computing_in(session.precision, session.loaded.model.device):
        before = task.samples(session.loaded, data.held_out)
    trained = train(session, console, resume=resume)
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
            record["baseline"] = finite(baseline)
            write_record(folder, record)
    finally:  # Ctrl-C stops the baseline, and the report is then without it
        write_report(folder, record, console)
    has_text = any(each.name in ("text", "prompt", "source") for each in task.columns)
    say(console, f"written to {folder}; try: tunerkit predict {folder} --{'text TEXT' if has_text else 'data FILE'}")
    say(console, f"report: {folder / 'report.html'}")


def _precision(recipe: Recipe, folder: Path, *, resume: bool) -> str:
    """The precision of the run: a resumed one has that which it began in, unless an earlier version began it."""
    kept = with_precision(read_recipe(output.recipe_file(folder))).precision if resume else None
    why = f"--resume: {folder} trains in this precision" if kept is not None else "precision"
    return hardware.choose_precision(_device(recipe), recipe.precision or kept, why=why)


def _device(recipe: Recipe) -> torch.device:
    return hardware.choose_device(use_cpu=recipe.training.get("use_cpu") is True)


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
        "rows": {part: len(rows) - _missing(session, part) for part, rows in data.parts.items()},
        "held_out": dict(data.findings),
        "columns": list(data.train[0]),
        "labels": list(data.labels),
        "metrics": dict(trained.metrics),
        "main_metric": task.main_metric_of(data.labels),
        "greater_is_better": task.greater_is_better,
        "logs": [dict(entry) for entry in trained.logs],
        "seconds": dict(trained.seconds),
        "device": str(loaded.model.device),
        "precision": session.precision,
        "max_length": task.limit,
        **adapter_facts(session.tuner, trained),
        "recipe": to_mapping(kept),
        "environment": environment(session.tuner.method),
    }
    if session.start is not None:  # as in the copy of the adapter, from which a resumed run starts
        record["config"] = tunerkit.unstructure(session.tuner.config.settled())
    if (conversations := are_conversations(task, data.train)) is not None:
        record["conversations"] = conversations
    if left_out := {part: dict(fit.left_out) for part, fit in session.fits.items() if fit.missing}:
        record["left_out"] = left_out
    if trained.confusion is not None:
        record["confusion"] = [list(row) for row in trained.confusion]
    with hardware.computing_in(session.precision, loaded.model.device):
        after = task.samples(loaded, data.held_out)
    if after:
        record["samples"] = [
            {"prompt": old["prompt"], "before": old["answer"], "after": new["answer"]}
            for old, new in zip(before, after, strict=True)
        ]
    plain: dict[str, Any] = finite(record)
    return plain


def _missing(session: Session, part: str) -> int:
    """How many rows of a part leave nothing to learn."""
    return session.fits[part].missing if part in session.fits else 0


def prepare(
    recipe: Recipe, task: Task, data: Data, console: Console, *, resume: bool = False, dry_run: bool = False
) -> Session:
    """Load the model, put the adapter into it, encode the rows, and build the trainer.

    In a dry run no logger is attached to it, since some write files as a training begins.
    """
    start = start_of(recipe, resume=resume)
    labels, ordered = head_labels(start, task, data)
    demo = {} if recipe.data is not None else demo_of(task.name, "data").training
    training = {**demo, **recipe.training}
    precision = hardware.choose_precision(_device(recipe), recipe.precision)
    arguments = trainer_arguments(task, training, Path(recipe.out), precision=precision, has_eval=bool(data.held_out))
    settle_prompts_(task, data.train[0], recipe.train_on_prompts, recipe.training, arguments, earlier=resume)
    if dry_run:
        arguments.report_to = []
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
    if isinstance(task, GenerationTask) and (note := cut_at_positions_(arguments, loaded)):
        say(console, f"note: {note}")
    watching = Watching(console, tuner, tuner.method)
    trainer, fits = build_fitted(
        task,
        arguments,
        loaded,
        {"train": data.source, "eval": data.held_out_source},
        model=loaded.model,
        train_dataset=task.encode(data.train, loaded),
        eval_dataset=_held_out(task, data, loaded),
        processing_class=loaded.processor,
        callbacks=[watching],
        **task.trainer_settings(loaded),
    )
    refuse_untrainable(trainer)
    tunerkit.attach(loaded.model, trainer)
    return Session(recipe, task, data, loaded, tuner, trainer, watching, start, fits)


def _held_out(task: Task, data: Data, loaded: Pretrained) -> Any:
    """The held-out rows as the trainer takes them; None without any."""
    if not data.held_out:
        return None
    encoded = task.encode(data.held_out, loaded)
    if isinstance(task, CausalLm) or "input_ids" not in (encoded.column_names or ()):
        return encoded
    return encoded.select(short_to_long(encoded))


def rehearse(session: Session, console: Console, *, resume: bool) -> None:
    """Begin the training and end it before its first step, so that all is checked that the training checks."""
    session.trainer.remove_callback(session.watching)  # it would draw its bar
    session.trainer.add_callback(Rehearsal())
    with suppress(RehearsedError):
        _train(session, console, resume=resume)


def _train(session: Session, console: Console, *, resume: bool) -> None:
    with session.watching.interruptible(), telling_warnings(console), explaining(session.start):
        session.trainer.train(
            resume_from_checkpoint=True if resume and output.has_checkpoint(Path(session.recipe.out)) else None
        )


def train(session: Session, console: Console, *, resume: bool) -> Trained:
    """Train and evaluate."""
    tuner, trainer = session.tuner, session.trainer
    start = RankChange(step=0, budget=tuner.budget() if tuner.ranks() else 0, ranks=tuner.ranks())
    began = time.perf_counter()
    _train(session, console, resume=resume)
    if session.watching.interrupted:
        raise KeyboardInterrupt
    seconds = {"train": time.perf_counter() - began}
    metrics: dict[str, float] = {}
    confusion = None
    if session.data.held_out:
        began = time.perf_counter()
        results = session.task.evaluate(trainer, trainer.eval_dataset)
        metrics, confusion = results.metrics, results.confusion
        seconds["evaluate"] = time.perf_counter() - began if results.seconds is None else results.seconds
        when = f"on the held-out rows after {tuner.steps} steps"
        refuse_nonfinite(metrics["loss"], when, trainer.args.learning_rate)
    return Trained(trainer.state.log_history, start, seconds, metrics, confusion)


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
