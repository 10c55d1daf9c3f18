"""The tasks: their rows and splits, fixed before any training."""

import hashlib
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import attrs
from torch import nn

from benchmarks.quality.batches import Rows
from benchmarks.quality.classifying import load_classifier
from benchmarks.quality.definitions import load_definer
from benchmarks.quality.images import Images, cifar, digits, fashion, load_image_classifier
from benchmarks.quality.sources import Examples, Tagged, brown, glosses, rated
from benchmarks.quality.tagging import load_tagger
from tunerkit.errors import TunerkitError

MAX_LENGTH = 128
BATCH_SIZE = 16
# All linear layers of the blocks, or all dense convolutions, by one pattern that means the same here and in PEFT.
BERT = r".*encoder\.layer\..*\.(query|key|value|dense)"
QUERY_VALUE = r".*encoder\.layer\..*\.(query|value)"
LLAMA = r".*layers\..*_proj"
EFFICIENTNET = r".*blocks\..*\.(conv_pw|conv_pwl)"
PROJECTIONS = r".*blocks\..*\.conv_pwl"
_SPLIT_SEED = 0  # a constant: a run's seed never changes the split


class TaskError(TunerkitError):
    """A task has too few rows for its parts."""


class Table(Protocol):
    """Raw rows, before tokenization."""

    def __len__(self) -> int: ...

    def take(self, rows: Sequence[int], /) -> Self:
        """These rows, in this order."""


Loader = Callable[[Sequence[Any], Path, int], tuple[nn.Module, Sequence[Rows]]]


@attrs.frozen(eq=False)
class Parts:
    """The rows of a task as model inputs."""

    train: Rows
    validation: Rows
    test: Rows


@attrs.frozen
class Task:
    """A data source, the number of rows in each part, the number of epochs, and a model.

    ``load`` builds the model and the rows of each part from the parts, the cache folder and a seed. ``targets`` are the
    modules that get adapters; ``heads`` are new modules that are trained in full.
    """

    name: str
    read: Callable[[Path], Table]
    load: Loader
    train: int
    validation: int
    test: int
    epochs: int
    targets: str = BERT
    heads: tuple[str, ...] = ("classifier",)

    @property
    def steps(self) -> int:
        """Optimizer steps of a training."""
        return self.epochs * -(-self.train // BATCH_SIZE)

    def cut(self, cache: Path) -> tuple[Table, Table, Table]:
        """Training, validation and test rows; the split is fixed. Raises `TaskError` if there are too few rows."""
        found = self.read(cache)
        needed = self.train + self.validation + self.test
        if len(found) < needed:
            raise TaskError(f"{self.name}: {needed} rows are wanted and {len(found)} are there")
        order = list(range(len(found)))
        random.Random(_SPLIT_SEED).shuffle(order)
        first, second = self.train, self.train + self.validation
        return found.take(order[:first]), found.take(order[first:second]), found.take(order[second:needed])

    def build(self, cache: Path, seed: int) -> tuple[nn.Module, Parts]:
        """The pretrained model, its heads drawn by ``seed``, and the rows."""
        model, parts = self.load(self.cut(cache), cache, seed)
        return model, Parts(*parts)


def digest(rows: Table) -> str:
    """A digest of rows in their order, to detect a changed split."""
    match rows:
        case Tagged():
            content = repr(list(zip(rows.words, rows.tags, strict=True))).encode()
        case Examples():
            content = repr(list(zip(rows.texts, rows.labels, strict=True))).encode()
        case Images():
            content = rows.pixels.numpy().tobytes() + rows.labels.numpy().tobytes()
        case _:
            raise TypeError(f"no digest of {type(rows).__name__}")
    return hashlib.sha256(content).hexdigest()[:16]


def classify(parts: Sequence[Examples], cache: Path, seed: int) -> tuple[nn.Module, Sequence[Rows]]:
    """all-MiniLM-L6-v2 with a head for the labels of the training rows."""
    return load_classifier(parts, cache, seed=seed, max_length=MAX_LENGTH)


def tag(parts: Sequence[Tagged], cache: Path, seed: int) -> tuple[nn.Module, Sequence[Rows]]:
    """all-MiniLM-L6-v2 with a head for the tags of the training rows."""
    return load_tagger(parts, cache, seed=seed, max_length=MAX_LENGTH)


def define(parts: Sequence[Examples], cache: Path, seed: int) -> tuple[nn.Module, Sequence[Rows]]:
    """SmolLM2-135M-Instruct, which already has its head."""
    return load_definer(parts, cache, seed=seed, max_length=MAX_LENGTH)


def _rated(name: str, *, neutral: bool) -> Callable[[Path], Examples]:
    return rated(f"{name}_GroundTruth.txt", neutral=neutral)


def _pictures(name: str, read: Callable[[Path], Images]) -> Task:
    heads = ("backbone.classifier",)
    return Task(name, read, load_image_classifier, 4800, 2000, 4000, epochs=1, targets=EFFICIENTNET, heads=heads)


_BASIC = (
    Task("brown-tags", brown, tag, 4800, 1000, 2000, epochs=1),
    Task("wordnet-41", glosses("field"), classify, 9600, 2000, 4000, epochs=1),
    _pictures("fashion-10", fashion),
    _pictures("digits-10", digits),
    _pictures("cifar-10", cifar),
    Task("movie-2", _rated("movieReviewSnippets", neutral=False), classify, 2400, 1500, 3000, epochs=2),
    Task("amazon-3", _rated("amazonReviewSnippets", neutral=True), classify, 1600, 900, 1100, epochs=3),
    Task("tweets-3", _rated("tweets", neutral=True), classify, 1600, 1000, 1500, epochs=3),
    Task("nyt-3", _rated("nytEditorialSnippets", neutral=True), classify, 2400, 1000, 1700, epochs=2),
)
# The same rows with adapters on queries and values only, as in the LoRA paper: a third of the matrices. In the image
# network, adapters are only on the convolutions that end a block: half of them.
_FEWER = {BERT: ("qv", QUERY_VALUE), EFFICIENTNET: ("pwl", PROJECTIONS)}
_NARROW = tuple(
    attrs.evolve(task, name=f"{task.name}/{name}", targets=targets)
    for task in _BASIC
    for name, targets in [_FEWER[task.targets]]
)
# A step of this task costs ten times as much, so training is shorter, and there are no curves.
_DEFINITIONS = Task("definitions", glosses("word"), define, 1600, 400, 800, epochs=1, targets=LLAMA, heads=())
TASKS = {task.name: task for task in (*_BASIC, *_NARROW, _DEFINITIONS)}
CURVES = tuple(task.name for task in (*_BASIC, *_NARROW))
PICTURES = frozenset(task.name for task in (*_BASIC, *_NARROW) if task.targets in (EFFICIENTNET, PROJECTIONS))
