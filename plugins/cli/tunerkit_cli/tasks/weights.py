"""Weights of classes in a classifier's loss."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from tunerkit.errors import ConfigError, closest
from tunerkit.paths import few
from tunerkit_cli.tasks.base import NOT_LEARNED, Row, Task

TASKS: Final = ("text-classification", "token-classification", "image-classification")


Weights = str | Sequence[float] | Mapping[str, float]


def class_weights(given: Weights, task: Task, rows: Sequence[Row], labels: Sequence[str]) -> list[float]:
    """The weights of ``labels``, with a mean of 1 over the training rows. Raises `ConfigError` if they do not fit."""
    counts = Counter(name for row in rows for name in task.classes_of(row))
    classes = f"the classes are {few(list(labels), shown=30)}"
    if task.name not in TASKS:
        raise ConfigError([f"class_weights: {task.name} has none; they are for {', '.join(TASKS)}"])
    if isinstance(given, str):
        if given != "balanced":
            hint = closest(given, ["balanced"])
            raise ConfigError([f"class_weights: expected balanced, a list or a mapping, got {given!r}{hint}"])
        found = {name: 1 / max(counts[name], 1) for name in labels}
    elif isinstance(given, Mapping):
        if unknown := [name for name in given if name not in labels]:
            raise ConfigError(
                [f"class_weights.{name}: there is no such class{closest(name, labels)}; {classes}" for name in unknown]
            )
        found = {name: given.get(name, 1) for name in labels}
    else:
        if len(given) != len(labels):
            raise ConfigError([f"class_weights: expected {len(labels)} weights, got {len(given)}; {classes}"])
        found = dict(zip(labels, given, strict=True))
    total = sum(found[name] * count for name, count in counts.items())
    if not total > 0:
        raise ConfigError([f"class_weights: no class of a training row has a weight above 0; {classes}"])
    return [weight * counts.total() / total for weight in found.values()]


def weighted_loss(weights: Sequence[float], *, smoothing: float = 0.0) -> Callable[..., Any]:
    """Return the cross-entropy of logits (..., classes) with these weights, for a Trainer's ``compute_loss_func``."""
    from torch.nn.functional import cross_entropy

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        logits = outputs["logits"].flatten(0, -2)
        count = (labels != NOT_LEARNED).sum() if num_items_in_batch is None else num_items_in_batch
        weight = logits.new_tensor(weights)
        total = cross_entropy(logits, labels.flatten(), weight, reduction="sum", label_smoothing=smoothing)
        return total / count  # torch leaves out labels of NOT_LEARNED, too

    return loss
