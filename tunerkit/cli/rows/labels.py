"""Class names and numbers, and the split into training and held-out rows."""

import random
from collections.abc import Iterable, Sequence
from typing import TypeVar

from tunerkit.cli.rows.reading import DataError
from tunerkit.errors import shown
from tunerkit.paths import few

T = TypeVar("T")


def class_names(labels: Iterable[str]) -> tuple[str, ...]:
    """Sort the classes: by number if all are whole numbers, else by name."""
    names = set(labels)
    # Python refuses to convert numbers of thousands of digits; such labels are names.
    if all(name.removeprefix("-").isdecimal() and len(name) < 20 for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def class_numbers(labels: Iterable[str], names: Sequence[str]) -> list[int]:
    """Return each label's index in ``names``. Raises `DataError` for labels that are not in the training data."""
    number = {name: place for place, name in enumerate(names)}
    labels = list(labels)
    unknown = sorted(set(labels) - set(names))
    if unknown:
        new, there = (few([shown(name) for name in some], shown=10) for some in (unknown, names))
        raise DataError(
            f"labels [{new}] are not in the training data, which has [{there}]; leave these rows out, or train with "
            "rows of these labels"
        )
    return [number[label] for label in labels]


def split(rows: Sequence[T], *, train_rows: int, seed: int) -> tuple[list[T], list[T]]:
    """Shuffle by ``seed`` and split into ``train_rows`` rows and the rest; the same split in every run."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return [rows[row] for row in order[:train_rows]], [rows[row] for row in order[train_rows:]]
