"""``tunerkit train``: read, load, wrap, train, evaluate, and write the output folder."""

import time
from pathlib import Path
from typing import Any

import attrs
from rich.console import Console

import tunerkit
from tunerkit import RankChange, Tuner
from tunerkit.cli import assets, outputs
from tunerkit.cli.demo import demo_of
from tunerkit.cli.recipes import writing
from tunerkit.cli.recipes.recipe import Recipe, to_mapping, with_full_paths
from tunerkit.cli.rows.labels import split
from tunerkit.cli.rows.reading import DataError, read_table
from tunerkit.cli.running import output
from tunerkit.cli.running.arguments import trainer_arguments
from tunerkit.cli.running.baseline import NoBaselineError, head_alone
from tunerkit.cli.running.building import build_trainer
from tunerkit.cli.running.callbacks import Watching, refuse_nonfinite
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
from tunerkit.cli.running.telling import say, telling_warnings
from tunerkit.cli.tasks import task_of
from tunerkit.cli.tasks.base import Row, Task
from tunerkit.cli.tasks.infer import infer
from tunerkit.errors import shown
from tunerkit.integrations.output_folder import VERSION
from tunerkit.integrations.pretrained import Pretrained, load_pretrained, quiet

HELD_OUT_SHARE = 0.2
# The split is fixed: the seed changes the training, never the rows it is evaluated on.
SPLIT_SEED = 0


@attrs.frozen
class Data:
    """The rows of a run, and the names of their classes.

    Where a part of the training data is held out, a class may have rows in that part alone.
    """

    train: list[Row]
    held_out: list[Row]
    source: str
    held_out_source: str
    labels: tuple[str, ...]


@attrs.frozen(eq=False)
class Session:
    """A run that is ready to train."""

    recipe: Recipe
    task: Task
    data: Data
    loaded: Pretrained
    tuner: Tuner
    trainer: Any
    watching: Watching


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
    folder = Path(recipe.out)
    output.check(folder, recipe, resume=resume, overwrite=overwrite)
    tunerkit.structure(recipe.method, recipe.config)  # report a typo before creating or downloading anything
    if not dry_run:
        outputs.prepare(folder)
    quiet()
    with telling_warnings(console):
        task, data = prepare_data(recipe, console)
        session = prepare(recipe, task, data, console)
    describe(session, console)
    if dry_run:
        say(console, "dry run: nothing was trained and nothing was written")
        return
    kept = with_full_paths(attrs.evolve(recipe, task=task.name))
    output.begin(folder, writing.dump(kept), resume=resume)
    before = task.samples(session.loaded, data.held_out)
    trained = train(session, console, resume=resume)
    record = record_of(session, trained, kept, before)
    tunerkit.save(session.loaded.model, folder)
    session.loaded.processor.save_pretrained(folder)
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


def record_of(session: Session, trained: Trained, kept: Recipe, before: list[dict[str, str]]) -> dict[str, Any]:
    """The record of a run. ``kept`` is the recipe with full paths, and ``before`` the samples before training."""
    task, data, loaded = session.task, session.data, session.loaded
    record: dict[str, Any] = {
        "version": VERSION,
        "task": task.name,
        "model": model_facts(loaded, session.trainer.args.seed),
        "data": {"train": data.source, "eval": data.held_out_source},
        "rows": {"train": len(data.train), "eval": len(data.held_out)},
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
        "environment": environment(kept.method),
    }
    if trained.confusion is not None:
        record["confusion"] = [list(row) for row in trained.confusion]
    if after := task.samples(loaded, data.held_out):
        record["samples"] = [
            {"prompt": old["prompt"], "before": old["answer"], "after": new["answer"]}
            for old, new in zip(before, after, strict=True)
        ]
    plain: dict[str, Any] = finite(record)
    return plain


def prepare_data(recipe: Recipe, console: Console) -> tuple[Task, Data]:
    """Read the data, find the task, and check and split the rows."""
    if recipe.data is None:
        if recipe.eval_data is not None:
            raise DataError("eval_data needs data: the demo has its own held-out sentences; pass --data too")
        task = task_of(recipe.task or "text-classification", recipe.max_length)
        demo = demo_of(task.name, "data")
        table = demo.rows(assets.cache_folder(), lambda text: say(console, text))
        train_rows, rest = split(task.rows(table, {}), train_rows=demo.train_rows, seed=SPLIT_SEED)
        labels = task.labels(train_rows)
        return task, Data(train_rows, rest[: demo.held_out_rows], table.source, "others of them", labels)
    table = read_table(Path(recipe.data))
    task = task_of(recipe.task or infer(table, recipe.columns), recipe.max_length)
    rows = task.rows(table, recipe.columns)
    labels = task.labels(rows)
    if recipe.eval_data is not None:
        other = read_table(Path(recipe.eval_data))
        return task, Data(rows, task.rows(other, recipe.columns), table.source, other.source, labels)
    held_out = round(HELD_OUT_SHARE * len(rows))
    if held_out < 2:
        raise DataError(
            f"{table.source}: {len(rows)} rows are too few to hold a fifth of them out for evaluation; add rows, or "
            "pass others with --eval-data"
        )
    train_rows, rest = split(rows, train_rows=len(rows) - held_out, seed=SPLIT_SEED)
    return task, Data(train_rows, rest, table.source, f"a fifth of {table.source}", labels)


def prepare(recipe: Recipe, task: Task, data: Data, console: Console) -> Session:
    """Load and wrap the model, encode the rows, and build the trainer."""
    demo = {} if recipe.data is not None else demo_of(task.name, "data").training
    arguments = trainer_arguments(task, {**demo, **recipe.training}, Path(recipe.out), has_eval=bool(data.held_out))
    seed = arguments.seed
    source = recipe.model
    if source is None:
        source = str(demo_of(task.name, "model").model(assets.cache_folder(), lambda text: say(console, text)))
    loaded = load_pretrained(task.name, source, labels=data.labels, seed=seed)
    trained = recipe.config.get("train_modules") or list(loaded.heads)
    tunerkit.wrap(loaded.model, recipe.method, {**recipe.config, "train_modules": trained}, seed=seed)
    kind, _ = task.trainer_classes()
    watching = Watching(console, tunerkit.tuner(loaded.model), recipe.method)
    trainer = build_trainer(
        kind,
        arguments,
        model=loaded.model,
        train_dataset=task.encode(data.train, loaded),
        eval_dataset=task.encode(data.held_out, loaded) if data.held_out else None,
        processing_class=loaded.processor,
        callbacks=[watching],
        **task.trainer_settings(loaded),
    )
    tunerkit.attach(loaded.model, trainer)
    return Session(recipe, task, data, loaded, tunerkit.tuner(loaded.model), trainer, watching)


def describe(session: Session, console: Console) -> None:
    """Print what is about to be trained: data, lengths, steps and parameters."""
    data, arguments, train_set = session.data, session.trainer.args, session.trainer.train_dataset
    say(
        console, f"{session.task.name}: {len(data.train)} training rows of {data.source}, {len(data.held_out)} held out"
    )
    if "input_ids" in (train_set.column_names or ()):
        lengths = sorted(len(row) for row in train_set["input_ids"])
        at = f"{session.recipe.max_length or session.task.limit} tokens"
        say(console, f"lengths: {lengths[len(lengths) // 2]} tokens in the middle, {lengths[-1]} at most (cut at {at})")
    if data.labels:
        say(console, f"{len(data.labels)} classes: {', '.join(data.labels[:10])}{' …' * (len(data.labels) > 10)}")
    *_, steps = session.trainer.set_initial_training_values(arguments, session.trainer.get_train_dataloader())
    say(console, f"{steps} steps, {arguments.num_train_epochs:g} epochs, batches of {arguments.train_batch_size}")
    parameters = tunerkit.trainable_parameters(session.loaded.model)
    say(console, f"{session.recipe.method} on {len(session.tuner.targets)} matrices: {parameters}")


def train(session: Session, console: Console, *, resume: bool) -> Trained:
    """Train and evaluate."""
    tuner, trainer = session.tuner, session.trainer
    start = RankChange(step=0, budget=tuner.budget() if tuner.ranks() else 0, ranks=tuner.ranks())
    began = time.perf_counter()
    with session.watching.interruptible(), telling_warnings(console):
        trainer.train(
            resume_from_checkpoint=True if resume and output.has_checkpoint(Path(session.recipe.out)) else None
        )
    if session.watching.interrupted:
        raise KeyboardInterrupt
    seconds = {"train": time.perf_counter() - began}
    metrics: dict[str, float] = {}
    confusion = None
    if session.data.held_out:
        began = time.perf_counter()
        results = session.task.evaluate(trainer, trainer.eval_dataset, session.data.held_out, session.data.labels)
        metrics, confusion = results.metrics, results.confusion
        seconds["evaluate"] = time.perf_counter() - began
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
    say(console, f"{session.recipe.method} is {100 * (own - other):+.1f} points from the head alone")
    return baseline


def tell(session: Session, trained: Trained, console: Console) -> None:
    """Print the ranks and the metrics."""
    from tunerkit.report.rank_map import rank_map
    from tunerkit.report.terminal import rank_table

    tuner = session.tuner
    if (ranks := tuner.ranks()) and tuner.needs_steps:
        highest = max(trained.start.ranks.values(), default=None)
        console.print(rank_table(rank_map(ranks), initial=highest))
        say(console, f"budget {tuner.budget()}, live triplets {sum(ranks.values())}")
    if trained.metrics:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in trained.metrics.items())
        say(console, f"{session.recipe.method}: {shown} on {len(session.data.held_out)} held-out rows")
