"""What a run needs before its first step: the recipe as it began, the model, the adapter, the rows, and the trainer."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
from rich.console import Console

import tunerkit
from tunerkit.errors import ConfigError
from tunerkit.plugin import Tuner
from tunerkit_cli.assets import cache_folder, demo_of
from tunerkit_cli.folder import RunFolder
from tunerkit_cli.machine import hardware
from tunerkit_cli.preparing.data import Data
from tunerkit_cli.preparing.fitting import Fit, build_fitted, cut_at_positions_
from tunerkit_cli.preparing.resuming import earlier_defaults
from tunerkit_cli.preparing.starting import Start, continued, head_labels, order_note, start_of, wrapped
from tunerkit_cli.preparing.trainer import DECIDED, Stopping, asked_of, refuse_untrainable, trainer_arguments
from tunerkit_cli.recipes.reading import read_recipe
from tunerkit_cli.recipes.recipe import Recipe, as_placed, files_of, with_precision
from tunerkit_cli.report.record import Restart
from tunerkit_cli.rows import read_table
from tunerkit_cli.tasks.base import Task
from tunerkit_cli.tasks.language import SAMPLES, CausalLm, GenerationTask, settle_prompts_
from tunerkit_cli.tasks.metrics import Measure, measure_of
from tunerkit_cli.tasks.rewards import settle_engine_, settle_rewards_
from tunerkit_cli.tasks.texts import TextTask, labels_of, short_to_long
from tunerkit_cli.tasks.turns import read_template
from tunerkit_cli.tasks.weights import class_weights, weighted_loss
from tunerkit_cli.telling import say
from tunerkit_cli.watching.callback import MOST, SLOWER, Watching, read_restarts
from tunerkit_cli.watching.learning import Learning, advice
from tunerkit_transformers.free_memory import GIB
from tunerkit_transformers.learned_positions import is_scored
from tunerkit_transformers.memory_plan import Plan, plan_of
from tunerkit_transformers.out_of_memory import noted_plan
from tunerkit_transformers.pretrained import Pretrained, load_pretrained
from tunerkit_transformers.quantising import sizes_of
from tunerkit_transformers.savings import Saving, speed_up

# What a resumed run has from its own recipe, whatever that leaves out.
_AS_BEGUN = ("precision", "train_on_prompts", "training", "samples", "loss")


@attrs.frozen(eq=False)
class Session:
    """A run that is ready to train; ``start`` is the adapter that it goes on from, or None if it trains a new one."""

    recipe: Recipe
    task: Task
    data: Data
    loaded: Pretrained
    tuner: Tuner
    trainer: Any
    watching: Watching
    start: Start | None
    fits: Mapping[str, Fit]  # how the rows of ``train`` and ``eval`` fit a language model
    savings: Sequence[Saving] = ()  # what was chosen for speed
    plan: Plan | None = None  # the memory
    measure: Measure = attrs.field(factory=Measure)  # the recipe's metrics

    def rows(self, part: str) -> int:
        """How many rows of ``"train"`` or ``"eval"`` count: those that leave something to learn."""
        missing = self.fits[part].missing if part in self.fits else 0
        return len(self.data.parts[part]) - missing

    @property
    def folder(self) -> RunFolder:
        """The output folder."""
        return RunFolder(Path(self.recipe.out))

    @property
    def precision(self) -> str:
        """What matrix products are computed in."""
        arguments = self.trainer.args
        return "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "fp32"


def settled(recipe: Recipe, folder: RunFolder, *, resume: bool) -> Recipe:
    """Return the recipe with its precision; a resumed run has the settings that it began with, or those of then."""
    device = hardware.choose_device(use_cpu=recipe.training.get("use_cpu") is True)
    if not resume:
        return attrs.evolve(recipe, precision=hardware.choose_precision(device, recipe.precision))
    kept = with_precision(read_recipe(folder.recipe_file()))
    precision = hardware.choose_precision(device, kept.precision, resumed=str(folder))
    changed = {name: recipe.training[name] for name in (DECIDED,) if name in recipe.training}  # which changes no number
    training = {**earlier_defaults(kept.task), **kept.training, **changed}
    kept = attrs.evolve(kept, precision=precision, training=training)
    recipe = attrs.evolve(recipe, columns=_columns_then(as_placed(kept, folder.path)))
    return attrs.evolve(recipe, **{name: getattr(kept, name) for name in _AS_BEGUN})


def _columns_then(kept: Recipe) -> dict[str, str]:
    """The names of columns of a run that is resumed: earlier versions did not join an instruction and its input."""
    if kept.task != "seq2seq" or kept.samples is not None or {"source", "prompt"} & {*kept.columns}:
        return kept.columns
    found = [{*read_table(Path(path), most=1).columns} for path in files_of(kept.data) if Path(path).is_file()]
    is_joined = any({"instruction", "input"} <= each and "source" not in each for each in found)
    return {**kept.columns, "source": "input"} if is_joined else kept.columns


def prepare(
    recipe: Recipe, task: Task, data: Data, console: Console, *, resume: bool = False, dry_run: bool = False
) -> Session:
    """Load the model, put the adapter into it, encode the rows, and build the trainer."""
    theirs = ("samples", "memory", "chat_template", *(() if isinstance(task, TextTask) else ("loss",)))
    idle = [name for name in theirs if getattr(recipe, name) is not None]
    if idle and not resume and not isinstance(task, GenerationTask):
        whose = "language models and classifiers of texts" if idle[0] == "loss" else "language models"
        raise ConfigError([f"{idle[0]}: is for {whose}, and {task.name} trains none; leave the key out"])
    folder = RunFolder(Path(recipe.out))
    restarts = read_restarts(folder) if resume else ()
    measure = measure_of(recipe.metric or (), task, data.held_out, recipe.metric_rows)
    settle_rewards_(task, recipe.reward or (), data.train)
    settle_engine_(task, recipe.engine, recipe.out)
    start = start_of(recipe, resume=resume)
    labels, ordered = head_labels(start, task, data)
    arguments = _arguments(recipe, task, data, resume=resume)
    arguments.learning_rate *= SLOWER ** len(restarts)
    if dry_run:  # some loggers write files as a training begins
        arguments.report_to = []
    seed = arguments.seed
    loaded = base_of(recipe, task, start, console, labels=labels, ordered=ordered, seed=seed)
    if data.labels:
        data = attrs.evolve(data, labels=labels_of(loaded))
    if start is not None:
        tuner = continued(loaded, recipe, task, start)
    else:
        tuner = wrapped(loaded, recipe, folder.settings if resume else {}, seed=seed)
    if note := order_note(start, tuner, data.labels):
        say(console, note)
    if note := cut_at_positions_(arguments, loaded):
        say(console, f"note: {note}")
    watching = _watching(recipe, task, data, arguments, tuner, restarts, console)
    parts = {"train": (data.source, task.encode(data.train, loaded))}
    parts["eval"] = (data.held_out_source, _held_out(task, data, loaded))
    patience = recipe.early_stopping_patience
    callbacks = [watching, *([] if patience is None else [Stopping(patience)])]
    trainer, fits = build_fitted(task, arguments, loaded, parts, callbacks)
    if recipe.class_weights is not None:
        weights = class_weights(recipe.class_weights, task, data.train, data.labels)
        trainer.compute_loss_func = weighted_loss(weights, smoothing=arguments.label_smoothing_factor)
    refuse_untrainable(trainer)
    savings: Sequence[Saving] = ()
    # A run that an earlier version began goes on as it did: its recipe lacks the key.
    if isinstance(task, GenerationTask | TextTask) and not (resume and recipe.loss is None):
        recipe, savings = _sped_up(recipe, task, trainer, resume=resume)
    plan = noted_plan(trainer) or plan_of(trainer)
    tunerkit.attach(loaded.model, trainer)
    return Session(recipe, task, data, loaded, tuner, trainer, watching, start, fits, savings, plan, measure)


def _arguments(recipe: Recipe, task: Task, data: Data, *, resume: bool) -> Any:
    """The trainer's arguments."""
    training = asked_of(recipe, task)
    device = hardware.choose_device(use_cpu=training.get("use_cpu") is True)
    precision = hardware.choose_precision(device, recipe.precision)
    arguments = trainer_arguments(task, training, Path(recipe.out), precision=precision, has_eval=bool(data.held_out))
    settle_prompts_(task, data.train[0], recipe.train_on_prompts, recipe.training, arguments, earlier=resume)
    return arguments


def base_of(recipe: Recipe, task: Task, start: Start | None, console: Console, **head: Any) -> Pretrained:
    """Load the base model, without adapters; ``head`` has its labels, whether they are ordered, and the seed."""
    source = recipe.model
    if source is None:
        source = str(demo_of(task.name, "model").model(cache_folder(), lambda text: say(console, text)))
    revision = start.revision if start is not None and start.model == source else None
    loaded = load_pretrained(
        task.name,
        source,
        revision=revision,
        dtype=recipe.dtype,
        quantisation=recipe.quantisation,
        attn_implementation=recipe.attn_implementation,
        **head,
    )
    if recipe.chat_template is not None:
        loaded.processor.chat_template = read_template(recipe.chat_template)
    if recipe.quantisation is not None:
        say(console, f"base: quantised as {recipe.quantisation}, {sizes_of(loaded.model)}")
    return loaded


def _watching(
    recipe: Recipe,
    task: Task,
    data: Data,
    arguments: Any,
    tuner: Tuner,
    restarts: Sequence[Restart],
    console: Console,
) -> Watching:
    """What follows the training."""
    guess = None if arguments.label_smoothing_factor or recipe.class_weights else task.guess_loss(data.train)
    usual = task.defaults["learning_rate"]
    tried = advice(arguments.learning_rate, arguments.warmup_steps, usual=usual)
    may_restart = recipe.on_collapse == "restart" and len(restarts) < MOST
    # A restart goes back to a checkpoint, and must not depend on the speed of the machine.
    spaces = recipe.on_collapse != "restart" and {"save_steps", "save_strategy"}.isdisjoint(asked_of(recipe, task))
    follow = partial(Learning, guess, tried, usual, judges=task.judges_loss)
    return Watching(console, tuner, follow, restarts, may_restart=may_restart, spaces=spaces)


def _sped_up(recipe: Recipe, task: Task, trainer: Any, *, resume: bool) -> tuple[Recipe, Sequence[Saving]]:
    """Let a trainer compute what its training needs, and return the recipe with what was chosen."""
    keep = {*recipe.training, *(["loss"] if recipe.loss == "trl" else [])}
    keep |= {"train_sampling_strategy"} if isinstance(task, GenerationTask) and task.keeps_order else set()
    savings = speed_up(trainer, keep=keep, memory=None if recipe.memory is None else recipe.memory * GIB)
    if isinstance(task, TextTask):
        asked = "loss" if recipe.loss == "learned" else None
        savings = tuple(each for each in savings if each.changed or each.name == asked)
        return attrs.evolve(recipe, loss="learned" if savings else recipe.loss), savings
    if resume:  # its recipe asks for what was asked or decided then
        savings = tuple(
            attrs.evolve(each, why="as the run began") if each.why == "as asked" else each for each in savings
        )
    training, loss = dict(recipe.training), recipe.loss or ("learned" if is_scored(trainer) else "trl")
    if DECIDED in vars(trainer.args):
        training[DECIDED] = bool(trainer.args.gradient_checkpointing)
    samples = SAMPLES if recipe.samples is None else recipe.samples
    return attrs.evolve(recipe, training=training, loss=loss, samples=samples), savings


def _held_out(task: Task, data: Data, loaded: Pretrained) -> Any:
    """The held-out rows as the trainer takes them; None without any."""
    if not data.held_out:
        return None
    encoded = task.encode(data.held_out, loaded)
    if isinstance(task, CausalLm) or "input_ids" not in (encoded.column_names or ()):
        return encoded
    return encoded.select(short_to_long(encoded))
