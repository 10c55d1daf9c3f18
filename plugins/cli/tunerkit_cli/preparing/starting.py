"""The adapter of a run: a new one, or the one that its training goes on from, with its copy for resuming."""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
from torch import nn

import tunerkit
from tunerkit import TunerkitError, TunerkitWarning, serialization
from tunerkit.errors import BaseMismatchError, ConfigError, FileError, StepError, shown
from tunerkit.paths import few, is_under
from tunerkit.plugin import Description, Tuner
from tunerkit_cli.folder import ADAPTER, START, START_FACTS, RunFolder, as_json
from tunerkit_cli.machine.hardware import choose_device, obstacle
from tunerkit_cli.machine.processes import by_the_first
from tunerkit_cli.preparing.checking import refuse_absent
from tunerkit_cli.preparing.data import Data
from tunerkit_cli.recipes.reading import mapping_at
from tunerkit_cli.recipes.recipe import DEFAULT_METHOD, DTYPES, PRECISIONS, Recipe
from tunerkit_cli.rows import DataError, tidy
from tunerkit_cli.tasks.base import Task
from tunerkit_cli.tasks.texts import labels_of
from tunerkit_transformers import transformers_private
from tunerkit_transformers.output_folder import RECORD, read_run
from tunerkit_transformers.pretrained import Pretrained, classes_of
from tunerkit_transformers.run_folder import RECIPE, placed, read_record, stated

# What a recipe need not say: an output folder's record does, and so does the recipe of a run that is resumed.
_FROM_RUN = ("task", "model", "dtype", "precision", "method", "chat_template")
_ANEW = "or train a new adapter without --from"


@attrs.frozen
class Start:
    """An adapter to go on from, which is loaded from ``path``. What its files do not say is None, or empty."""

    source: str  # as the user gave it
    path: str
    method: str | None = None
    model: str | None = None
    revision: str | None = None  # the commit of the hub
    task: str | None = None
    dtype: str | None = None
    precision: str | None = None  # if this machine has it
    labels: tuple[str, ...] = ()  # of its head, in the order of the logits


def find_start(source: str) -> Start:
    """Read what an adapter says of itself, of tunerkit's or of another program's. Raises `FileError`."""
    path = Path(source).expanduser()
    format = serialization.format_at(path)
    if format is not None:
        found = Description("") if format.describe is None else format.describe(path)
        # Another program's name of a method may differ from tunerkit's in its case alone.
        method = found.method.lower() if found.method.lower() in tunerkit.methods() else None
        return Start(source, str(path), method=method, model=found.base or None)
    folder = path.parent if path.name == ADAPTER else path
    if (folder / RECORD).is_file():
        return _of_run(source, folder)
    refuse_absent(source)
    try:
        _, _, header = serialization.read(path, content="adapter")
    except FileError as problem:
        raise FileError(f"--from {source}: {problem}") from None
    return Start(source, str(path), method=header.method)


def _of_run(source: str, folder: Path) -> Start:
    run = read_run(folder)
    method, precision = run.record.get("method"), run.record.get("precision")
    return Start(
        source,
        str(folder),
        method=method if isinstance(method, str) else None,
        model=run.source,
        revision=run.revision,
        task=run.task,
        dtype=run.dtype if run.dtype in DTYPES else "auto",  # which is what it was then
        precision=precision if precision in PRECISIONS and not obstacle(choose_device(), precision) else None,
        labels=run.labels,
    )


def completed(mapping: Mapping[str, Any], recipe: Recipe, *, resume: bool) -> dict[str, Any]:
    """A recipe's mapping with what it leaves to the adapter it goes on from, or to its own if it is resumed."""
    kept = Path(recipe.out).expanduser() / RECIPE
    said = _said(recipe) if not resume else mapping_at(kept) if kept.is_file() else {}
    known = {name: said[name] for name in _FROM_RUN if said.get(name) is not None}
    if {"bf16", "fp16"} & {*recipe.training}:  # another way to say the precision
        known.pop("precision", None)
    return {**known, **{name: value for name, value in mapping.items() if value is not None}}


def _said(recipe: Recipe) -> dict[str, Any]:
    assert recipe.from_adapter is not None
    start = find_start(recipe.from_adapter)
    if recipe.config:
        raise TunerkitError(
            f"--from {start.source}: the adapter keeps its own settings, so config ({', '.join(recipe.config)}) cannot "
            "be set; leave it out, or train a new adapter without --from"
        )
    _refuse_method(recipe, start, start.method)
    if recipe.model is None and start.model is None:
        raise TunerkitError(f"--from {start.source}: the adapter does not say which base model it is for; pass --model")
    base = Path(start.model or "")
    if recipe.model is None and base.is_absolute() and not base.exists():
        raise TunerkitError(
            f"--from {start.source}: its base model was in {start.model}, which is gone; pass the folder where it is "
            "now with --model"
        )
    # The method of another program's adapter is known for sure once it is loaded: its plugin may not be installed.
    if start.task is None:
        return {"model": start.model}
    # A template that the recipe named; the base's own comes with its tokenizer.
    template, kept = Path(start.path, "chat_template.jinja"), read_record(Path(start.path)).get("recipe")
    is_own = isinstance(kept, dict) and kept.get("chat_template") is not None and recipe.task in (None, start.task)
    return {**attrs.asdict(start), "chat_template": str(template) if is_own and template.is_file() else None}


def _refuse_method(recipe: Recipe, start: Start, method: str | None) -> None:
    """Raise `TunerkitError` if a recipe names another method than the adapter's, which is None as long as unknown."""
    if recipe.method is not None and method is not None and recipe.method.casefold() != method.casefold():
        raise TunerkitError(
            f"--from {start.source}: it is a {method} adapter, and --method is {recipe.method}; leave --method out, or "
            "train a new adapter without --from"
        )


def start_of(recipe: Recipe, *, resume: bool) -> Start | None:
    """The adapter that a run goes on from; None if it trains a new one. A resumed run has its own copy."""
    if recipe.from_adapter is None:
        return None
    source, folder = recipe.from_adapter, RunFolder(Path(recipe.out))
    file = folder / START_FACTS
    if not (resume and file.is_file()):
        return find_start(source)
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        model = None if facts["model"] is None else placed(facts["model"], folder.path)
        return Start(source, str(folder / START), **{**facts, "model": model, "labels": tuple(facts["labels"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as problem:
        raise FileError(
            f"{file}: is damaged ({shown(str(problem))}); delete it to start from {source} again"
        ) from problem


@by_the_first
def keep_start(start: Start, model: nn.Module, scratch: Path, folder: RunFolder) -> None:
    """Copy the loaded adapter into a scratch folder, before training: the original may be gone at resuming."""
    (scratch / START).mkdir(parents=True)
    tunerkit.save(model, scratch / START)
    facts = {name: value for name, value in attrs.asdict(start).items() if name not in ("source", "path")}
    facts["model"] = None if start.model is None else stated(start.model, folder.path)
    (scratch / START_FACTS).write_text(as_json(facts), encoding="utf-8")


def place_start(scratch: Path, folder: RunFolder) -> None:
    """Move that copy beside the run's checkpoints, if there is one."""
    for name in (f"{START}/{ADAPTER}", START_FACTS):  # in this order: the facts say that the copy is whole
        if (scratch / name).is_file():
            folder.note([name])
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).replace(folder / name)


@contextmanager
def explaining(start: Start | None) -> Iterator[None]:
    """Inside the block, an error of the method's schedule says what can be changed: not the adapter's settings."""
    try:
        yield
    except (ConfigError, StepError) as problem:
        if start is None:
            raise
        raise TunerkitError(
            f"{problem}\nThese are settings of the adapter --from {start.source}, which stay. Its schedule begins "
            "anew: change the length of this training, with --epochs or --set training.max_steps=..., or train a new "
            "adapter without --from"
        ) from None


# --- in the model ---


def head_labels(start: Start | None, task: Task, data: Data) -> tuple[Sequence[str], bool]:
    """The classes of a run's head, and whether their order is fixed, by the adapter that the run goes on from."""
    if start is None or not (data.labels and start.labels) or start.task != task.name:
        return data.labels, False
    known = {*start.labels, *map(tidy, start.labels)}  # earlier versions kept the white space around names
    if new := [name for name in data.labels if name not in known]:
        raise DataError(
            f"{data.source}: has the classes [{_listed(new)}], and the head of the adapter --from {start.source} is "
            f"for [{_listed(start.labels)}]; leave these rows out, {_ANEW}"
        )
    return start.labels, True


def wrapped(loaded: Pretrained, recipe: Recipe, begun: Mapping[str, object], *, seed: int) -> Tuner:
    """Put a new adapter into the model; ``begun`` counts where the recipe is silent: defaults may have changed."""
    trained = recipe.config.get("train_modules") or list(loaded.heads)
    method = DEFAULT_METHOD if recipe.method is None else recipe.method
    config, as_begun = (
        tunerkit.structure(method, {**known, **recipe.config, "train_modules": trained}) for known in ({}, begun)
    )
    if config.settled() != as_begun.settled():  # else what the user left to defaults stays so in the record
        config = as_begun
    tunerkit.wrap(loaded.model, method, config, seed=seed)
    return tunerkit.tuner(loaded.model)


def continued(loaded: Pretrained, recipe: Recipe, task: Task, start: Start) -> Tuner:
    """Put the adapter that a training goes on from into the model. Raises `TunerkitError` if it does not fit."""
    model, is_classifier = loaded.model, "Classification" in classes_of(task.name).model
    # A classifier's modules outside its pretrained part that the checkpoint did not have; loading adds parameters too.
    outside = [pair for pair in model.named_children() if pair[0] != model.base_model_prefix] if is_classifier else []
    new = [name for name, child in outside if not all(map(transformers_private.is_loaded, child.parameters()))]
    try:
        tunerkit.load(model, start.path, trainable=True)
    except BaseMismatchError as problem:
        labels = labels_of(loaded) if is_classifier else ()
        here = f"{len(labels)}: {_listed(labels)}"
        classes = f", and data with as many classes as its head has (here are {here})" if is_classifier else ""
        raise BaseMismatchError(
            f"{problem}\n- --from {start.source}: pass the base that the adapter was trained on with --model{classes}, "
            f"{_ANEW}"
        ) from None
    tuner = tunerkit.tuner(model)
    _refuse_method(recipe, start, tuner.method)
    _refuse_new_heads(new, tuner, loaded, start)
    return tuner


def _refuse_new_heads(new: Sequence[str], tuner: Tuner, loaded: Pretrained, start: Start) -> None:
    """Raise `TunerkitError` if the adapter trains no part of a new head; warn of parts that it does not train."""
    left = [head for head in new if not any(is_under(place.path, [head]) for place in tuner.copies)]
    if left and len(left) == len(new):
        raise TunerkitError(
            f"--from {start.source}: the adapter trains no head, and {shown(loaded.source)} has none for this task, so "
            f"its new {few(left, shown=3)} would stay random; pass the model that the adapter was trained on with "
            f"--model, {_ANEW}"
        )
    if left:
        warnings.warn(
            f"{few(left, shown=3)} is new in this model and no part of the adapter --from {start.source}: it stays "
            "random, as the seed of the run makes it",
            TunerkitWarning,
            stacklevel=2,
        )


def order_note(start: Start | None, tuner: Tuner, labels: Sequence[str]) -> str:
    """What to say of a head whose classes have no names in the adapter's files; empty if they have."""
    if start is None or start.labels or not labels or not tuner.copies:
        return ""
    return f"{start.source} does not name the classes of its head; they are taken in this order: {_listed(labels)}"


def _listed(names: Sequence[str]) -> str:
    return few([shown(name) for name in names], shown=10)
