"""Any number of labels for each text."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

from tunerkit.errors import shown
from tunerkit_cli.rows.labels import class_names, class_numbers
from tunerkit_cli.rows.reading import DataError
from tunerkit_cli.tasks.base import LABEL, TEXT, Column, Row
from tunerkit_cli.tasks.classifying import probabilities
from tunerkit_cli.tasks.texts import PAIR, TextTask

THRESHOLD = 0.5


class MultiLabel(TextTask):
    """Texts, or pairs of texts, with a list of labels, which may be empty."""

    name: ClassVar[str] = "multi-label"
    columns: ClassVar[tuple[Column, ...]] = (
        TEXT,
        PAIR,
        Column("label", ("labels", "classes", "tags"), predicted=True, option=LABEL.option),
    )
    main_metric: ClassVar[str] = "f1"
    greater_is_better: ClassVar[bool] = True
    has_baseline: ClassVar[bool] = False

    def label(self, value: object, where: str) -> list[str]:
        """A list of labels; in csv and tsv, a JSON list such as ``["a", "b"]``."""
        return tag_list(value, where, "label")

    def labels(self, rows: Sequence[Row]) -> tuple[str, ...]:
        """All labels."""
        names = class_names(label for row in rows for label in row["label"])
        if not names:
            raise DataError('no training row has a label; each row has a list of labels, such as ["sport", "war"]')
        return names

    def classes_of(self, row: Row) -> Sequence[str]:
        """The row's labels."""
        labels: list[str] = row["label"]
        return labels

    def guess_loss(self, rows: Sequence[Row]) -> float | None:
        """The mean entropy of the labels, each of which is there or not."""
        counts = Counter(name for row in rows for name in {*row["label"]})
        shares = [count / len(rows) for count in counts.values() if count < len(rows)]
        return -sum(p * math.log(p) + (1 - p) * math.log(1 - p) for p in shares) / len(counts) if counts else None

    def targets(self, rows: Sequence[Row], labels: Sequence[str]) -> list[list[float]]:
        """A row of 0 and 1 for each text."""
        chosen = [set(class_numbers(row["label"], labels)) for row in rows]
        return [[float(number in own) for number in range(len(labels))] for own in chosen]

    def scores(self, predictions: Any, truth: Any) -> dict[str, float]:
        """Micro F1, and the share of rows with exactly the right labels. A label is predicted above 0.5."""
        from sklearn.metrics import accuracy_score, f1_score

        predicted = (predictions > 0).astype(int)  # a logit of 0 is a probability of THRESHOLD
        wanted = truth.astype(int)
        return {
            "f1": float(f1_score(wanted, predicted, average="micro", zero_division=0)),
            "exact": float(accuracy_score(wanted, predicted)),
        }

    def pipeline_options(self) -> dict[str, Any]:
        """A probability for each label."""
        return {"function_to_apply": "sigmoid", "top_k": None}

    def prediction(self, found: Any, labels: Sequence[str]) -> dict[str, Any]:
        """The labels above the threshold, and all probabilities."""
        scores = probabilities(found, labels)
        return {"labels": sorted(name for name, score in scores.items() if score > THRESHOLD), "scores": scores}


def tag_list(value: object, where: str, name: str) -> list[str]:
    """Return a list of names of classes, none of which is blank. Raises `DataError`."""
    found = label_list(value, where, name)
    if not all(map(str.strip, found)):
        raise DataError(f"{where}, column {name!r}: has an empty name in {shown(found)}; fill it in, or remove it")
    return found


def label_list(value: object, where: str, name: str) -> list[str]:
    """Return a list of names, also from JSON in a cell. Raises `DataError`."""
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            found = None
    if not isinstance(found, list) or not all(isinstance(each, str | int) and each != "" for each in found):
        raise DataError(f'{where}, column {name!r}: expected a list of texts such as ["a", "b"], got {shown(value)}')
    return [str(each) for each in found]
