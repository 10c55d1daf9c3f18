"""Put the adapter of a run into its model: a new one, or the one that the run goes on from."""

import warnings
from collections.abc import Mapping, Sequence

import tunerkit
from tunerkit import BaseMismatchError, Tuner, TunerkitError, TunerkitWarning
from tunerkit.errors import shown
from tunerkit.paths import few
from tunerkit_cli.recipes.recipe import DEFAULT_METHOD, Recipe
from tunerkit_cli.rows.labels import tidy
from tunerkit_cli.rows.reading import DataError
from tunerkit_cli.running.data import Data
from tunerkit_cli.running.starting import Start, refuse_method
from tunerkit_cli.tasks.base import Task
from tunerkit_cli.tasks.texts import labels_of
from tunerkit_transformers import transformers_private
from tunerkit_transformers.pretrained import Pretrained, classes_of

_ANEW = "or train a new adapter without --from"


def head_labels(start: Start | None, task: Task, data: Data) -> tuple[Sequence[str], bool]:
    """The classes of a run's head, and whether their order is fixed: by the head of the adapter that it goes on from.

    Raises:
        DataError: The data has classes that this head has not.
    """
    if start is None or not (data.labels and start.labels) or start.task != task.name:
        return data.labels, False
    known = {*start.labels, *map(tidy, start.labels)}  # earlier versions kept the white space around names
    if new := [name for name in data.labels if name not in known]:
        raise DataError(
            f"{data.source}: has the classes [{_listed(new)}], and the head of the adapter --from {start.source} is "
            f"for [{_listed(start.labels)}]; leave these rows out, {_ANEW}"
        )
    return start.labels, True


def adapt(
    loaded: Pretrained,
    recipe: Recipe,
    task: Task,
    start: Start | None,
    *,
    begun: Mapping[str, object] | None,
    seed: int,
) -> Tuner:
    """Put a new adapter into the model, or the one to go on from, to be trained.

    ``begun`` are the settings with which the run began whose training goes on, every default written out. They count
    where the recipe is silent: a default of the method may have changed since.

    Raises:
        TunerkitError: It does not fit the model, or leaves a new head untrained.
    """
    if start is not None:
        return _go_on(loaded, recipe, task, start)
    trained = recipe.config.get("train_modules") or list(loaded.heads)
    method = DEFAULT_METHOD if recipe.method is None else recipe.method
    config, as_begun = (
        tunerkit.structure(method, {**known, **recipe.config, "train_modules": trained}) for known in ({}, begun or {})
    )
    if config.settled() != as_begun.settled():  # else what the user left to defaults stays so in the record
        config = as_begun
    tunerkit.wrap(loaded.model, method, config, seed=seed)
    return tunerkit.tuner(loaded.model)


def _go_on(loaded: Pretrained, recipe: Recipe, task: Task, start: Start) -> Tuner:
    new = _new_heads(loaded, task)  # before loading, which adds parameters of its own
    try:
        tunerkit.load(loaded.model, start.path, trainable=True)
    except BaseMismatchError as problem:
        raise BaseMismatchError(
            f"{problem}\n- --from {start.source}: pass the base that the adapter was trained on with --model"
            f"{_of_classes(loaded, task)}, {_ANEW}"
        ) from None
    tuner = tunerkit.tuner(loaded.model)
    refuse_method(recipe, start, tuner.method)
    _refuse_new_heads(new, tuner, loaded, start)
    return tuner


def _of_classes(loaded: Pretrained, task: Task) -> str:
    """What else must fit if the adapter has a head: the number of classes."""
    if not _is_classifier(task):
        return ""
    labels = labels_of(loaded)
    return f", and data with as many classes as its head has (here are {len(labels)}: {_listed(labels)})"


def _is_classifier(task: Task) -> bool:
    return "Classification" in classes_of(task.name).model


def _new_heads(loaded: Pretrained, task: Task) -> list[str]:
    """The paths of a classifier's modules outside its pretrained part that the checkpoint did not have."""
    if not _is_classifier(task):
        return []
    outside = (pair for pair in loaded.model.named_children() if pair[0] != loaded.model.base_model_prefix)
    return [name for name, child in outside if not all(map(transformers_private.is_loaded, child.parameters()))]


def _refuse_new_heads(new: Sequence[str], tuner: Tuner, loaded: Pretrained, start: Start) -> None:
    """Raise `TunerkitError` if the adapter trains no part of a new head; warn of parts that it does not train."""
    trained = [place.path for place in tuner.copies]
    left = [head for head in new if not any(path == head or path.startswith(f"{head}.") for path in trained)]
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
    """What to tell of a head whose classes have no names in the adapter's files; empty if they have."""
    if start is None or start.labels or not labels or not tuner.copies:
        return ""
    return f"{start.source} does not name the classes of its head; they are taken in this order: {_listed(labels)}"


def _listed(names: Sequence[str]) -> str:
    return few([shown(name) for name in names], shown=10)
