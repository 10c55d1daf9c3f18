"""What a task is: its columns, its model, its trainer and its metrics."""

import importlib.util
import json
import math
import pkgutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import attrs

from tunerkit.errors import TunerkitError, closest
from tunerkit.extras import install
from tunerkit_cli.rows import BadValue, DataError, Table, checked_rows, class_names, require_column
from tunerkit_transformers.pretrained import Pretrained
from tunerkit_transformers.task_classes import TASKS


class MissingPackageError(TunerkitError):
    """A package that a task needs is not installed."""


# One row under our own names of its columns.
Row = dict[str, Any]


@attrs.frozen
class Column:
    """A column of a task's data, by our name of it, as in the recipe's ``columns``."""

    name: str
    other_names: tuple[str, ...] = ()  # by which it is found too, if exactly one of them is there
    needed: bool = True  # by training
    predicted: bool = False  # so that prediction does without it
    option: str | None = None  # of ``tunerkit train``, for its name


@attrs.frozen
class Results:
    """The metrics of a model, with ``loss``; the confusion matrix, with rows by true class; and how long it took.

    Where a row has one class, ``right`` says of each encoded row whether its class was predicted.
    """

    metrics: dict[str, float]
    confusion: list[list[int]] | None = None
    seconds: float | None = None
    right: Sequence[bool] | None = None


# How classifiers are trained, whose heads start at random. With Adam's usual values more runs were lost at twice the
# default rate than with these (docs/evidence/quality-record.md, "How far the default rate is from collapse").
STEADY: Mapping[str, Any] = {"warmup_steps": 0.1, "adam_beta2": 0.95, "max_grad_norm": 0.3}
# How language models are trained.
USUAL: Mapping[str, Any] = {"warmup_steps": 0.06, "adam_beta2": 0.999, "max_grad_norm": 1.0}
TEXT = Column("text", ("sentence", "sentence1", "premise", "review", "content", "document"), option="--text-column")
LABEL = Column("label", ("labels", "class", "category"), predicted=True, option="--label-column")


NOT_LEARNED = -100  # a label that the loss leaves out, in torch and transformers


class Task(ABC):
    """One kind of training. A run calls the methods in this order: rows, labels, encode, evaluate."""

    columns: ClassVar[tuple[Column, ...]]
    main_metric: ClassVar[str] = "loss"
    measures: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "f1")  # the names of its metrics
    max_length: ClassVar[int] = 128  # in tokens, if the recipe sets none
    # Whether the same head can be trained alone, for comparison.
    has_baseline: ClassVar[bool] = False
    # Whether the base does the task without a training, so that each run is compared with it.
    base_can: ClassVar[bool] = False
    # Whether a language model learns the tokens of prompts too; None if the rows have no prompts that it could learn.
    trains_on_prompts: bool | None = None
    # Our name of the column with a row's class, classes or number; empty for language models.
    label_column: ClassVar[str] = ""
    one_class: ClassVar[bool] = False  # whether each row has exactly one, so that there is a confusion matrix
    labelled: ClassVar[str] = "training row has the label"  # for messages
    keeps_columns: ClassVar[bool] = False  # whether rows keep the other columns of their table too
    judges_loss: ClassVar[bool] = True  # whether a training's loss tells whether it learns
    batch_counts: ClassVar[bool] = False  # whether a row's loss depends on the size of its batch
    # The classes of the trainer and of its arguments, which are imported when they are needed.
    trainer: ClassVar[tuple[str, str]] = ("transformers:Trainer", "transformers:TrainingArguments")
    # The trainer's arguments, where a recipe does not set them.
    defaults: ClassVar[Mapping[str, Any]] = {
        "num_train_epochs": 3,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 16,  # sorted by length: larger ones are mostly padding where rows are few
        "weight_decay": 0.0,
        "eval_strategy": "no",  # once, at the end
        **STEADY,
    }

    def __init__(self, name: str, max_length: int | None = None) -> None:
        self.name = name  # in `TASKS`
        self.limit = self.max_length if max_length is None else max_length

    # --- rows ---

    def rows(
        self, table: Table, names: Mapping[str, str], *, predicting: bool = False, renaming: bool = True
    ) -> list[Row]:
        """Return the table's rows under our names of the columns, with checked values. Raises `DataError`."""
        read = self.columns_read(table, names, predicting=predicting, renaming=renaming)
        rows = checked_rows(table, read, self.checked, by_recipe=renaming)
        if not self.keeps_columns or predicting:
            return rows
        others = [name for name in table.columns if name not in read.values()]
        return [
            {**{name: all_of[name] for name in others}, **row} for all_of, row in zip(table.rows, rows, strict=True)
        ]

    def columns_read(
        self, table: Table, names: Mapping[str, str], *, predicting: bool = False, renaming: bool = True
    ) -> dict[str, str]:
        """The columns that `rows` reads by our names, all of which the table has. Raises `DataError` as it does."""
        ours = [each.name for each in self.columns]
        if unknown := [name for name in names if name not in ours]:
            raise DataError(
                f"columns.{unknown[0]}: the task {self.name} has no such column; its columns are {', '.join(ours)}"
                f"{closest(unknown[0], ours)}"
            )
        wanted = self.columns_for(table, names, predicting=predicting)
        read = [(each, name_in(table, each, names)) for each in wanted if not (predicting and each.predicted)]
        return {
            each.name: require_column(table, name, self.name, each.option, ours=each.name, renaming=renaming)
            for each, name in read
            if each.needed or each.name in names or name in table.columns
        }

    def columns_for(self, table: Table, names: Mapping[str, str], *, predicting: bool) -> Sequence[Column]:
        """The columns to read from a table: all of the task's, or one form of them if it has several."""
        return self.columns

    def checked(self, row: Row) -> Row:
        """Return a row with values of the task's types: texts, where it has no others. Raises `BadValue`."""
        return {name: require_text(row, name) for name in row}

    def main_metric_of(self, labels: Sequence[str]) -> str:
        """The metric that a verdict names, for a run with these classes."""
        return self.main_metric

    def labels(self, rows: Sequence[Row]) -> tuple[str, ...]:
        """The names of the classes in the order of the logits; empty if the task has none. One raises `DataError`."""
        names = class_names(name for row in rows for name in self.classes_of(row))
        if len(names) == 1:
            raise DataError(f"every {self.labelled} {names[0]!r}; a classifier needs at least two classes")
        return names

    def classes_of(self, row: Row) -> Sequence[str]:
        """The classes that a row's labels name; none if the task has none."""
        value = row.get(self.label_column)
        return [value] if isinstance(value, str) else value if isinstance(value, list) else ()

    def renamed(self, row: Row, rename: Callable[[str], str]) -> Row:
        """Return a row with other names of its classes."""
        new = [*map(rename, self.classes_of(row))]
        return {**row, self.label_column: new if isinstance(row[self.label_column], list) else new[0]} if new else row

    def identity(self, row: Row) -> Hashable:
        """What makes two rows the same input, whatever their labels."""
        return tuple(
            (name, value if isinstance(value, str) else json.dumps(value))
            for name, value in row.items()
            if name != self.label_column
        )

    def guess_loss(self, rows: Sequence[Row]) -> float | None:
        """The training loss of answering by the frequencies in ``rows`` alone; for classes, their entropy."""
        counts = Counter(name for row in rows for name in self.classes_of(row)).values()
        total = sum(counts)
        return -sum(count / total * math.log(count / total) for count in counts) if total else None

    # --- model and trainer ---

    @abstractmethod
    def encode(self, rows: Sequence[Row], loaded: Pretrained) -> Any:
        """Return the rows as a `datasets.Dataset` that the trainer takes."""

    def trainer_classes(self) -> tuple[type[Any], type[Any]]:
        """The classes of the trainer and of its arguments."""
        kind, arguments = self.trainer
        if kind.startswith("trl."):
            require_package("trl", f"the task {self.name}", "lm")
        return pkgutil.resolve_name(kind), pkgutil.resolve_name(arguments)

    def trainer_settings(self, loaded: Pretrained) -> dict[str, Any]:
        """What the trainer is given beyond model, arguments, data and processor."""
        return {}

    # --- results ---

    def scores(self, predictions: Any, truth: Any) -> dict[str, float]:
        """The metrics beside the loss, of a trainer's predictions and label ids (arrays with a row for each row).

        By default accuracy and macro F1 of logits (rows, classes), or (rows, words, classes), for class numbers. The
        mean F1 is over the classes that are true or predicted in a row: others have none.
        """
        from sklearn.metrics import accuracy_score, f1_score

        kept = truth != NOT_LEARNED
        predicted, truth = predictions[kept].argmax(-1), truth[kept]
        accuracy, f1 = accuracy_score(truth, predicted), f1_score(truth, predicted, average="macro", zero_division=0)
        return {"accuracy": float(accuracy), "f1": float(f1)}

    def confusion(self, predictions: Any, truth: Any) -> list[list[int]]:
        """The confusion matrix of the same, rows by true class."""
        from sklearn.metrics import confusion_matrix

        kept, classes = truth != NOT_LEARNED, list(range(predictions.shape[-1]))
        found: Any = confusion_matrix(truth[kept], predictions[kept].argmax(-1), labels=classes)
        counts: list[list[int]] = found.tolist()
        return counts

    def compute_metrics(self, prediction: Any) -> dict[str, float]:
        """`scores` of a `transformers.EvalPrediction`: a trainer logs them, and chooses the best checkpoint by them."""
        return self.scores(first_output(prediction.predictions), prediction.label_ids)

    def evaluate(self, trainer: Any, dataset: Any) -> Results:
        """Evaluate on encoded rows that have labels."""
        with in_order(trainer.args):
            found = trainer.predict(dataset)
        predictions, truth = first_output(found.predictions), found.label_ids
        metrics = {**self.scores(predictions, truth), "loss": found.metrics["test_loss"]}
        if not self.one_class:
            return Results(metrics)
        return Results(metrics, self.confusion(predictions, truth), right=(predictions.argmax(-1) == truth).tolist())

    def samples(self, loaded: Pretrained, rows: Sequence[Row], count: int) -> list[dict[str, str]]:
        """The first ``count`` prompts, and the answers ``after`` training; classifiers give none."""
        return []

    @abstractmethod
    def predict(self, loaded: Pretrained, rows: Sequence[Row], *, batch_size: int) -> list[dict[str, Any]]:
        """Predict each row, in their order, as values that JSON can hold."""

    def save_merged(self, loaded: Pretrained, folder: Path) -> None:
        """Write a model without adapters, and its processor."""
        loaded.model.save_pretrained(folder)
        loaded.processor.save_pretrained(folder)


@contextmanager
def in_order(arguments: Any) -> Iterator[None]:
    """Let a trainer take held-out rows in their order; one that groups batches by length draws another, by its seed."""
    before = arguments.train_sampling_strategy
    arguments.train_sampling_strategy = "sequential"
    try:
        yield
    finally:
        arguments.train_sampling_strategy = before


def first_output(predictions: Any) -> Any:
    """The logits in what a trainer predicts: some models return further outputs after them."""
    return predictions[0] if isinstance(predictions, tuple) else predictions


def pipeline_of(task: str, loaded: Pretrained) -> Callable[..., Any]:
    """The pipeline of transformers for a task, with a loaded model."""
    import transformers

    name: Any = TASKS[task].pipeline
    processor = "image_processor" if "Image" in TASKS[task].processor else "tokenizer"
    settings: dict[str, Any] = {processor: loaded.processor, "device": loaded.model.device}
    return transformers.pipeline(name, model=loaded.model, **settings)  # type: ignore[no-any-return]


def require_package(name: str, what: str, extra: str) -> None:
    """Raise `MissingPackageError` if a module cannot be found that something needs, such as "the task preference"."""
    if importlib.util.find_spec(name) is None:
        raise MissingPackageError(f"{what} needs {name}: {install(extra)}")


def require_text(row: Row, name: str) -> str:
    """Return a text that is not empty. Raises `BadValue`."""
    value = row[name]
    if not isinstance(value, str):
        raise BadValue(name, "expected text, got %s", value)
    if not value.strip():
        raise BadValue(name, "the text is empty; remove the row, or fill it in")
    return value


def name_in(table: Table, wanted: Column, names: Mapping[str, str]) -> str:
    """The name of a column in a table: the given one, ours, or another. Raises `DataError` if there are several."""
    if wanted.name in names or wanted.name in table.columns:
        return names.get(wanted.name, wanted.name)
    others = [name for name in wanted.other_names if name in table.columns]
    if len(others) > 1:
        raise DataError(
            f"{table.source}: the column {wanted.name!r} may be {' or '.join(map(repr, others))}; say which one it is "
            f"with columns.{wanted.name} in the recipe{f' or with {wanted.option}' if wanted.option else ''}"
        )
    return others[0] if others else wanted.name
