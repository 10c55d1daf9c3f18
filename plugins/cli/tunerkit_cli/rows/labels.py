"""Class names and numbers, and the split into training and held-out rows."""

import random
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import TypeVar

from tunerkit.errors import shown
from tunerkit.paths import few
from tunerkit_cli.rows.reading import DataError

T = TypeVar("T")
_AS_NUMBERS = {"true": "1", "false": "0"}


def tidy(name: str) -> str:
    """A class's name without the white space around it, in Unicode's form NFC: these are not seen when it is shown."""
    return unicodedata.normalize("NFC", name.strip())


def look_alikes(names: Iterable[str]) -> list[list[str]]:
    """The groups of names that differ in case, spaces or width alone, or as ``true`` and ``1`` do."""
    groups = defaultdict(list)
    for name in sorted(set(names)):
        key = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        groups[_AS_NUMBERS.get(key, key)].append(name)
    return [group for group in groups.values() if len(group) > 1]


def class_names(labels: Iterable[str]) -> tuple[str, ...]:
    """Sort the classes: by number if all are whole numbers, else by name."""
    names = set(labels)
    # Python refuses to convert numbers of thousands of digits; such labels are names.
    if all(name.removeprefix("-").isdecimal() and len(name) < 20 for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def class_numbers(labels: Iterable[str], names: Sequence[str]) -> list[int]:
    """Return each label's index in ``names``. Raises `DataError` for labels that are not in the training data.

    Runs of earlier versions have names that are not tidy, which tidy labels are found by too.
    """
    number = {tidy(name): place for place, name in enumerate(names)}
    number |= {name: place for place, name in enumerate(names)}
    labels = list(labels)
    unknown = sorted(set(labels) - number.keys())
    if unknown:
        new, there = (few([shown(name) for name in some], shown=10) for some in (unknown, names))
        raise DataError(
            f"labels [{new}] are not in the training data, which has [{there}]; leave these rows out, or train with "
            "rows of these labels"
        )
    return [number[label] for label in labels]


def split(rows: Sequence[T], *, train_rows: int, seed: int) -> tuple[list[T], list[T]]:
    """Shuffle by ``seed`` and split into ``train_rows`` rows and the rest; the same split in every run."""
    order = _shuffled(len(rows), seed)
    return [rows[row] for row in order[:train_rows]], [rows[row] for row in order[train_rows:]]


def split_by_class(rows: Sequence[T], labels: Sequence[str], *, every: int, seed: int) -> tuple[list[T], list[T]]:
    """Shuffle by ``seed`` and hold one of ``every`` rows out, of each class as of all.

    A class of ``n`` rows has ``n / every`` held-out ones, rounded up or down, and a class of one row has none. The
    splitters of scikit-learn count in the same way, but refuse a class of one row, and data with many small classes.
    """
    order, counts = _shuffled(len(rows), seed), Counter(labels)
    by_class = sorted((row for row in order if counts[labels[row]] > 1), key=labels.__getitem__)
    held = {*by_class[every // 2 :: every]}
    return [rows[row] for row in order if row not in held], [rows[row] for row in order if row in held]


def _shuffled(count: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order
