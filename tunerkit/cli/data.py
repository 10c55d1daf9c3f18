"""Labelled sentences: read from csv, jsonl or parquet, split, and converted to class numbers."""

import csv
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import attrs
import pyarrow.parquet

from tunerkit import TunerkitError
from tunerkit.errors import closest, cut, shown
from tunerkit.paths import few

# The csv reader keeps values beyond the header under the key None.
Row = Mapping[str | None, object]


class DataError(TunerkitError, ValueError):
    """A data file cannot be read as labelled texts."""


@attrs.frozen
class Examples:
    """Texts and their labels, in the same order. A label is a class name, never a regression target."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Iterable[int]) -> "Examples":
        """Select these rows, in this order."""
        chosen = list(rows)
        return Examples(tuple(self.texts[row] for row in chosen), tuple(self.labels[row] for row in chosen))


def read_examples(path: Path, *, text_column: str = "text", label_column: str = "label") -> Examples:
    """Read ``path`` in the format of its suffix: .csv (with a header), .jsonl or .parquet.

    Labels are strings, whole numbers or booleans. Raises `DataError`, which names the file and the row (from 1).
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: data files end in {', '.join(_READERS)}, got {path.suffix or 'no ending'!r}")
    texts: list[str] = []
    labels: list[str] = []
    try:
        for number, row in enumerate(reader(path), start=1):
            texts.append(_text(_value(row, text_column, path, number, "--text-column"), path, number, text_column))
            labels.append(_label(_value(row, label_column, path, number, "--label-column"), path, number, label_column))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except DataError:
        raise
    except UnicodeDecodeError as problem:
        reason = f"it is not UTF-8 ({problem.reason}); save it with the encoding UTF-8"
        raise DataError(f"{path}: cannot be read as {path.suffix}: {reason} (in a spreadsheet: CSV UTF-8)") from problem
    except Exception as problem:  # csv and pyarrow raise many classes
        raise DataError(f"{path}: cannot be read as {path.suffix}: {_first_line(problem)}") from problem
    if not texts:
        raise DataError(f"{path}: the file has no rows")
    return Examples(tuple(texts), tuple(labels))


def class_names(labels: Iterable[str]) -> tuple[str, ...]:
    """Sort the classes: by number if all are whole numbers, else by name."""
    names = set(labels)
    # Python refuses to convert numbers of thousands of digits; such labels are names.
    if all(name.removeprefix("-").isdecimal() and len(name) < 20 for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def class_numbers(labels: Iterable[str], names: tuple[str, ...]) -> list[int]:
    """Return each label's index in ``names``. Raises `DataError` for labels that are not in the training data."""
    number = {name: place for place, name in enumerate(names)}
    labels = list(labels)
    unknown = sorted(set(labels) - set(names))
    if unknown:
        new, there = (few([shown(name) for name in some], shown=10) for some in (unknown, names))
        raise DataError(f"labels [{new}] are not in the training data, which has [{there}]")
    return [number[label] for label in labels]


def split(examples: Examples, *, train_rows: int, seed: int) -> tuple[Examples, Examples]:
    """Shuffle by ``seed`` and split into ``train_rows`` rows and the rest; the same split in every run."""
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    return examples.take(order[:train_rows]), examples.take(order[train_rows:])


def _read_csv(path: Path) -> Iterator[Row]:
    # utf-8-sig: spreadsheets write a byte-order mark before the first column's name.
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file, strict=True)


def _read_jsonl(path: Path) -> Iterator[Row]:
    # Not splitlines: it would also split at Unicode line breaks inside JSON strings.
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as problem:  # also for an integer of thousands of digits
                raise DataError(f"{path}: line {number} is not JSON: {_first_line(problem)}") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}: line {number}: expected a JSON object, got {type(row).__name__}")
            yield row


def _read_parquet(path: Path) -> Iterator[Row]:
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches():
            yield from batch.to_pylist()


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _value(row: Row, column: str, path: Path, number: int, option: str) -> object:
    if column not in row:
        names = [name for name in row if name is not None]
        others = few([shown(name) for name in names], shown=10)
        raise DataError(
            f"{path}: row {number} has no column {shown(column)}, only {others}{closest(column, names)} "
            f"(set the column's name with {option}{_delimiter_hint(names)})"
        )
    value = row[column]
    if value is None:
        raise DataError(f"{path}: row {number} has no value in column {column!r}")
    return value


def _delimiter_hint(names: Sequence[str]) -> str:
    """Say that a file has one column only because its delimiter is another one, as some spreadsheets write it."""
    found = next((delimiter for delimiter in (";", "\t", "|") if len(names) == 1 and delimiter in names[0]), None)
    return "" if found is None else f"; columns are separated by commas, and this file seems to use {found!r}"


def _text(value: object, path: Path, number: int, column: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{path}: row {number}, column {shown(column)}: expected text, got {shown(value)}")
    return value


def _label(value: object, path: Path, number: int, column: str) -> str:
    if value == "" or not isinstance(value, str | int):
        raise DataError(
            f"{path}: row {number}, column {column!r}: expected a class (text or whole number), got {shown(value)}"
        )
    return str(value)


def _first_line(problem: Exception) -> str:
    return cut(str(problem).partition("\n")[0] or type(problem).__name__, 300)
