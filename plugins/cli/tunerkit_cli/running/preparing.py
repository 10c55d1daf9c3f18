"""What a run needs before its first step: the recipe as it began, the model, the adapter, the rows, and the trainer."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
from rich.console import Console

import tunerkit
from tunerkit import Tuner
from tunerkit_cli import assets
from tunerkit_cli.demo import demo_of
from tunerkit_cli.recipes.reading import read_recipe
from tunerkit_cli.recipes.recipe import Recipe, with_precision
from tunerkit_cli.report.record import Restart
from tunerkit_cli.running import hardware, output
from tunerkit_cli.running.adapting import adapt, head_labels, order_note
from tunerkit_cli.running.arguments import asked_of, trainer_arguments
from tunerkit_cli.running.building import refuse_untrainable
from tunerkit_cli.running.callbacks import Watching
from tunerkit_cli.running.data import Data
from tunerkit_cli.running.fitting import build_fitted, cut_at_positions_
from tunerkit_cli.running.learning import Learning, advice
from tunerkit_cli.running.restarting import MOST, SLOWER, read_restarts, slower
from tunerkit_cli.running.session import Session
from tunerkit_cli.running.starting import start_of
from tunerkit_cli.running.telling import say
from tunerkit_cli.tasks.base import Task
from tunerkit_cli.tasks.causal_lm import CausalLm, settle_prompts_
from tunerkit_cli.tasks.generating import GenerationTask
from tunerkit_cli.tasks.texts import labels_of, short_to_long
from tunerkit_transformers.pretrained import Pretrained, load_pretrained
from tunerkit_transformers.quantising import bytes_of


def is_of_earlier_version(folder: Path) -> bool:
    """Whether a run was begun before recipes said the precision: its rows were split in another way."""
    return read_recipe(output.recipe_file(folder)).precision is None


def settled(recipe: Recipe, folder: Path, *, resume: bool) -> Recipe:
    """Return the recipe with its precision; a resumed run has the settings that it began with.

    Recipes of earlier versions lack keys. Such a run takes the machine's precision, learns prompts, and has the values
    for the trainer that were the defaults then.

    Raises:
        ConfigError: The machine does not have the precision.
    """
    device = hardware.choose_device(use_cpu=recipe.training.get("use_cpu") is True)
    if not resume:
        return attrs.evolve(recipe, precision=hardware.choose_precision(device, recipe.precision))
    kept = with_precision(read_recipe(output.recipe_file(folder)))
    precision = hardware.choose_precision(device, kept.precision, resumed=str(folder))
    training = {**_earlier_defaults(kept.task), **kept.training}
    return attrs.evolve(recipe, precision=precision, train_on_prompts=kept.train_on_prompts, training=training)


def _earlier_defaults(task: str | None) -> dict[str, Any]:
    """The arguments of the trainer that a recipe of an earlier version left to defaults which are others now."""
    if task in ("causal-lm", "preference", "seq2seq"):
        return {}
    return {"learning_rate": 1e-3, "warmup_steps": 0.06, "adam_beta2": 0.999, "max_grad_norm": 1.0}


def prepare(
    recipe: Recipe, task: Task, data: Data, console: Console, *, resume: bool = False, dry_run: bool = False
) -> Session:
    """Load the model, put the adapter into it, encode the rows, and build the trainer.

    In a dry run no logger is attached to it, since some write files as a training begins.
    """
    start = start_of(recipe, resume=resume)
    labels, ordered = head_labels(start, task, data)
    training = asked_of(recipe, task)
    device = hardware.choose_device(use_cpu=training.get("use_cpu") is True)
    precision = hardware.choose_precision(device, recipe.precision)
    arguments = trainer_arguments(task, training, Path(recipe.out), precision=precision, has_eval=bool(data.held_out))
    settle_prompts_(task, data.train[0], recipe.train_on_prompts, recipe.training, arguments, earlier=resume)
    if dry_run:
        arguments.report_to = []
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
    begun = output.settings_begun_with(Path(recipe.out)) if resume and start is None else None
    tuner = adapt(loaded, recipe, task, start, begun=begun, seed=seed)
    if note := order_note(start, tuner, data.labels):
        say(console, note)
    if isinstance(task, GenerationTask) and (note := cut_at_positions_(arguments, loaded)):
        say(console, f"note: {note}")
    watching = _watching(recipe, task, data, tuner, arguments, restarts, console)
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


def _watching(
    recipe: Recipe,
    task: Task,
    data: Data,
    tuner: Tuner,
    arguments: Any,
    restarts: Sequence[Restart],
    console: Console,
) -> Watching:
    """What follows the training: it judges the losses by the task's, and restarts the run if the recipe says so."""
    guess = None if arguments.label_smoothing_factor else task.guess_loss(data.train)
    usual = task.defaults["learning_rate"]
    tried = advice(arguments.learning_rate, arguments.warmup_steps, usual=usual)
    return Watching(
        console,
        tuner,
        tuner.method,
        follow=partial(Learning, guess, tried, usual),
        slower=partial(slower, restarts),
        may_restart=recipe.on_collapse == "restart" and len(restarts) < MOST,
    )


def _held_out(task: Task, data: Data, loaded: Pretrained) -> Any:
    """The held-out rows as the trainer takes them; None without any."""
    if not data.held_out:
        return None
    encoded = task.encode(data.held_out, loaded)
    if isinstance(task, CausalLm) or "input_ids" not in (encoded.column_names or ()):
        return encoded
    return encoded.select(short_to_long(encoded))
