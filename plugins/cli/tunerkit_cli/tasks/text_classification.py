"""One class for each text."""

from collections.abc import Sequence
from typing import Any, ClassVar

from tunerkit.errors import shown
from tunerkit_cli.rows.labels import class_names, class_numbers
from tunerkit_cli.rows.reading import DataError
from tunerkit_cli.tasks.base import Row
from tunerkit_cli.tasks.classifying import chosen_class, classification_scores, confusion_of
from tunerkit_cli.tasks.texts import TextTask


def class_label(value: object, where: str) -> str:
    """Return the name of a class: a text, a whole number or a boolean. Raises `DataError`."""
    if isinstance(value, list):
        raise DataError(
            f"{where}, column 'label': got a list, {shown(value)}; for several labels pass --task multi-label"
        )
    if isinstance(value, float) and not value.is_integer():
        raise DataError(
            f"{where}, column 'label': expected a class (text or whole number), got {shown(value)}. Is this "
            "regression? Then pass --task regression"
        )
    if isinstance(value, str) and not value.strip():
        raise DataError(f"{where}, column 'label': the label is empty; fill it in, or remove the row")
    if not isinstance(value, str | int | float):
        raise DataError(f"{where}, column 'label': expected a class (text or whole number), got {shown(value)}")
    return str(int(value) if isinstance(value, float) else value)


def several_classes(rows: Sequence[Row]) -> tuple[str, ...]:
    """The names of the classes. Raises `DataError` if there is only one."""
    names = class_names(row["label"] for row in rows)
    if len(names) < 2:
        raise DataError(f"every training row has the label {names[0]!r}; a classifier needs at least two classes")
    return names


class TextClassification(TextTask):
    """Texts, or pairs of texts, with one of several classes."""

    name: ClassVar[str] = "text-classification"
    main_metric: ClassVar[str] = "accuracy"
    greater_is_better: ClassVar[bool] = True
    one_class: ClassVar[bool] = True

    def label(self, value: object, where: str) -> str:
        """A class's name."""
        return class_label(value, where)

    def labels(self, rows: Sequence[Row]) -> tuple[str, ...]:
        """The classes."""
        return several_classes(rows)

    def classes_of(self, row: Row) -> Sequence[str]:
        """The row's class."""
        return [row["label"]]

    def targets(self, rows: Sequence[Row], labels: Sequence[str]) -> list[int]:
        """Class numbers."""
        return class_numbers((row["label"] for row in rows), labels)

    def scores(self, predictions: Any, truth: Any) -> dict[str, float]:
        """Accuracy and macro F1."""
        return classification_scores(predictions, truth)

    def confusion(self, predictions: Any, truth: Any) -> list[list[int]]:
        """Rows by true class, columns by predicted class."""
        return confusion_of(predictions, truth)

    def pipeline_options(self) -> dict[str, Any]:
        """A probability for each class."""
        return {"top_k": None}

    def prediction(self, found: Any, labels: Sequence[str]) -> dict[str, Any]:
        """The class, its probability, and those of all classes."""
        return chosen_class(found, labels)
