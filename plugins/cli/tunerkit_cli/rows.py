"""The rows of data files: csv, tsv, json, parquet, or folders of images; their classes, and the held-out rows."""

import csv
import json
import random
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import attrs

from tunerkit import TunerkitError
from tunerkit.errors import closest, cut, half_character, shown
from tunerkit.paths import few
from tunerkit_transformers.pretrained import closest_path
from tunerkit_transformers.run_folder import irregular

T = TypeVar("T")
Row = Mapping[str, object]
_LONGEST_VALUE = 2**31 - 1  # the greatest limit that csv takes on every system
_AS_NUMBERS = {"true": "1", "false": "0"}
_WHOLE = re.compile(r"\+?(-?)(?=\d)0*+(\d*)(?:\.0*)?")  # whole numbers as some programs write them: 01 and 1.0
IMAGES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


class DataError(TunerkitError, ValueError):
    """A data file cannot be read, or its rows do not fit the task."""


class BadValue(DataError):
    """A value does not fit. ``column`` is our name of its column, or None; ``values`` are shown for ``%s``."""

    def __init__(self, column: str | None, problem: str, *values: object) -> None:
        super().__init__(problem % tuple(map(shown, values)) if values else problem)
        self.column, self.problem = column, problem


@attrs.frozen
class Table:
    """The rows of a file, in its order, each with the file's columns."""

    source: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    folder: Path | None = None  # the file's, to which paths in its rows are relative; None if there is no file
    note: str = ""  # what of the source is not read
    made: Mapping[str, str] = attrs.field(factory=dict)  # of which columns of the file a column is made
    numbers: Sequence[int] | None = None  # which rows of the file these are, where some are left out
    weight: float | None = None  # the share of rows that are `drawn`

    def __len__(self) -> int:
        return len(self.rows)

    def number(self, place: int) -> int:
        """The number of a row in the file, from 1, by its place in the table, from 0."""
        return place + 1 if self.numbers is None else self.numbers[place]

    def without(self, places: Collection[int]) -> "Table":
        """The table without the rows at these places."""
        kept = [place for place in range(len(self)) if place not in places]
        return attrs.evolve(self, rows=tuple(self.rows[n] for n in kept), numbers=[self.number(n) for n in kept])


class BadRowsError(DataError):
    """Rows of a table do not fit: ``bad`` says why, by their places. Those with the same mistake are one sentence."""

    def __init__(self, table: Table, names: Mapping[str, str], bad: Mapping[int, BadValue], *, by_recipe: bool) -> None:
        self.bad, self.listed = bad, []
        alike = defaultdict(list)
        for place, each in bad.items():
            name = names.get(each.column, each.column) if each.column else None
            column = None if name is None else table.made.get(name, name)
            row = {"file": table.source, "row": table.number(place), "problem": str(each), "column": column}
            self.listed.append(row)
            alike[column, each.problem].append(row)
        said = []
        for (column, _), rows in alike.items():
            numbers = few([str(row["row"]) for row in rows], shown=3)
            where = "" if column is None else f", column {shown(column)}"
            said.append(f"row{'s' * (len(rows) > 1)} {numbers}{where}: {rows[0]['problem']}")
        do = "; drop_bad_rows: true in a recipe leaves them out" if by_recipe else ""
        count = f" ({len(bad)} of {len(table)} rows{do})"
        self.said = f"{table.source}: {'; and '.join(said)}"
        super().__init__(f"{self.said}{count if len(bad) < len(table) else ''}")


def read_table(path: Path, *, predicting: bool = False, most: int | None = None) -> Table:
    """Read a file, or the first ``most`` rows of it, by its suffix, or a folder of images. Raises `DataError`."""
    if path.is_dir():
        return _read_images(path, predicting=predicting)
    if (what := irregular(path)) is not None:
        raise DataError(f"{path}: is {what}, not a file; write the rows into a file, and pass that")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        allowed = ", ".join(READERS)
        raise DataError(
            f"{path}: data files end in {allowed}, got {path.suffix or 'no ending'!r}; for images, pass a folder with "
            "a subfolder per class"
        )
    try:
        rows = list(islice(reader(path), most))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file{closest_path(str(path))}") from None
    except DataError:
        raise
    except UnicodeDecodeError as problem:
        seems = "UTF-16" if problem.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "Windows-1252 or Latin-1"
        raise DataError(
            f"{path}: it is not UTF-8 ({problem.reason}), it seems to be {seems}; save it with the encoding UTF-8 (in "
            "a spreadsheet: CSV UTF-8)"
        ) from problem
    except csv.Error as problem:
        hint = "; is a quote never closed? Quotes inside a text in quotes are doubled"
        raise DataError(f"{path}: cannot be read as {path.suffix}: {_first_line(problem)}{hint}") from problem
    except Exception as problem:  # pyarrow raises many classes
        raise DataError(f"{path}: cannot be read as {path.suffix}: {_first_line(problem)}") from problem
    if not rows:
        raise DataError(f"{path}: there are no rows in this file; is it the right one?")
    return Table(str(path), tuple(dict.fromkeys(name for row in rows for name in row)), tuple(rows), path.parent)


def require_column(
    table: Table, name: str, task: str, option: str | None = None, *, ours: str = "NAME", renaming: bool = True
) -> str:
    """Return the name of a column that a task needs. Raises `DataError`, which says how to set another: ``option``."""
    if name not in table.columns:
        others = few([shown(each) for each in table.columns], shown=10)
        hint = closest(name, table.columns)
        set_it = f"set the column's name with columns.{ours} in the recipe{f' or with {option}' if option else ''}"
        how = set_it if renaming else f"name the columns as in the training data, or pass --column {ours}=YOURS"
        raise DataError(f"{table.source}: {task} needs a column {shown(name)}; there is only {others}{hint} ({how})")
    return name


def checked_rows(
    table: Table,
    names: Mapping[str, str],
    check: Callable[[dict[str, Any]], dict[str, Any]],
    *,
    by_recipe: bool = True,  # else a recipe's keys are no way out
) -> list[dict[str, Any]]:
    """The rows under our names of the columns, as ``check`` returns them. Raises `BadRowsError` for the others."""
    rows: dict[int, dict[str, Any]] = {}
    bad: dict[int, BadValue] = {}
    for place, given in enumerate(table.rows):
        row = {ours: given.get(name) for ours, name in names.items()}
        try:
            for ours, value in row.items():
                if isinstance(value, BadValue):
                    value.column = ours
                    raise value
                if value is None:
                    raise BadValue(ours, "has no value; fill it in, or remove the row")
            rows[place] = check(row)
        except BadValue as problem:
            bad[place] = problem
    for ours in names:
        kinds = {place: kind_of(row[ours]) for place, row in rows.items()}
        found = [*kinds.values()]
        usual = max(dict.fromkeys(found), key=found.count, default="")  # of as many, the first row's
        for place in (place for place, kind in kinds.items() if kind != usual):
            first = table.number(next(each for each, kind in kinds.items() if kind == usual))
            said = f"is a {kinds[place]}, and row {first} has a {usual}"
            bad.setdefault(place, BadValue(ours, f"{said}; write all rows as texts, or all as lists of messages"))
    if bad:
        raise BadRowsError(table, names, bad, by_recipe=by_recipe)
    return [*rows.values()]


def kind_of(value: object) -> str:
    """The word for a value in a message on texts and lists."""
    return "list" if isinstance(value, list) else "text"


def _read_images(folder: Path, *, predicting: bool) -> Table:
    inside = sorted(folder.iterdir())
    hidden = [each.name for each in inside if each.is_dir() and each.name.startswith(".")]
    classes = [each for each in inside if each.is_dir() and not each.name.startswith(".")]
    labelled = [(file, each.name) for each in classes for file in sorted(each.iterdir()) if _is_image(file)]
    flat = [each for each in inside if _is_image(each)]
    if not labelled and not (predicting and flat):
        raise DataError(f"{folder}: expected a subfolder per class with images ({', '.join(sorted(IMAGES))})")
    left_out = [f"the hidden folders {few([shown(name) for name in hidden], shown=5)}"] if hidden else []
    left_out += [f"{len(flat)} images in no subfolder, such as {flat[0].name}"] if flat and not predicting else []
    note = f"left out {' and '.join(left_out)}" if left_out else ""
    if predicting:
        rows = [{"image": str(file)} for file in (*flat, *(file for file, _ in labelled))]
        return Table(str(folder), ("image",), tuple(rows), note=note)
    pairs = tuple({"image": str(file), "label": name} for file, name in labelled)
    return Table(str(folder), ("image", "label"), pairs, note=note)


def _is_image(file: Path) -> bool:
    """By its name; a hidden file is none, such as those that macOS writes beside each image."""
    return file.suffix.lower() in IMAGES and not file.name.startswith(".")


def _read_csv(path: Path, delimiter: str = ",") -> Iterator[Row]:
    before = csv.field_size_limit(_LONGEST_VALUE)  # a document is often longer than csv's limit
    try:
        # utf-8-sig: spreadsheets write a byte-order mark before the first column's name.
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True, delimiter=delimiter)  # values stay texts: "NA" is one
            _check_header(path, reader.fieldnames or (), delimiter)
            for number, row in enumerate(reader, start=1):
                if None in row:  # values beyond the header
                    said = f"row {number} has more values than the header has columns"
                    raise DataError(f"{path}: {said}; put texts with the delimiter in quotes")
                yield row
    finally:
        csv.field_size_limit(before)


def _read_jsonl(path: Path) -> Iterator[Row]:
    # Not splitlines: it would also split at Unicode line breaks inside JSON strings.
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}: line {number}"
                yield _object(_parsed(line.strip(), where, "; write one object per line"), where)


def _read_json(path: Path) -> Iterator[Row]:
    """A list of objects; or lines of them, which many files of this name have."""
    text = path.read_text(encoding="utf-8-sig").strip()
    if not text.startswith("["):
        yield from _read_jsonl(path)
        return
    for number, row in enumerate(_parsed(text, f"{path}: the file"), start=1):
        yield _object(row, f"{path}: row {number}")


def _parsed(text: str, where: str, hint: str = "") -> Any:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as problem:
        raise DataError(f"{where} is not JSON: {problem.msg} at character {problem.pos + 1}{hint}") from None
    except RecursionError as problem:
        raise DataError(f"{where} is not JSON: {_first_line(problem)}") from None
    except ValueError:  # Python's own limit
        digits = sys.get_int_max_str_digits()
        raise DataError(
            f"{where} has a whole number of more than {digits:,} digits; put it in quotes if it is a name, or write a "
            "smaller one"
        ) from None
    if "\\u" in text and (wrong := half_character(json.dumps(found, ensure_ascii=False))) is not None:
        raise DataError(f"{where}: {wrong}")
    return found


def from_json(cell: object) -> object:
    """The value that a text in a cell writes as JSON, None if it is not JSON; other values as they are."""
    try:
        return json.loads(cell) if isinstance(cell, str) else cell
    except (ValueError, RecursionError):
        return None


def _object(row: object, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f'{where}: expected a JSON object such as {{"text": "..."}}, got {shown(row)}')
    return row


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024):  # the first row is asked for alone, too
            yield from map(without_nulls, batch.to_pylist())


def without_nulls(row: Row) -> Row:
    """A row whose mappings lack the keys without a value: in columns, each mapping has the keys of all others too."""

    def full(value: Any) -> Any:
        if isinstance(value, list):
            return [*map(full, value)]
        if isinstance(value, dict):
            return {key: full(each) for key, each in value.items() if each is not None}
        return value

    return {name: full(value) for name, value in row.items()}


_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _check_header(path: Path, names: Sequence[str], delimiter: str) -> None:
    """Raise `DataError` if two columns have one name, or if another delimiter separates them, as spreadsheets do it."""
    seems = next((each for each in _DELIMITERS if len(names) == 1 and each in names[0] and each != delimiter), None)
    if seems is not None:
        raise DataError(
            f"{path}: the header is {shown(names[0])}: this file seems to separate columns by {_DELIMITERS[seems]}; "
            f"save it with {_DELIMITERS[delimiter]}"
        )
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"{path}: the header has the column {shown(twice)} twice; rename or remove one of the two")


def _first_line(problem: Exception) -> str:
    return cut(str(problem).partition("\n")[0] or type(problem).__name__, 300)


# --- classes and the split ---


def tidy(name: str) -> str:
    """A class's name without the white space around it, in Unicode's form NFC: these are not seen when it is shown."""
    return unicodedata.normalize("NFC", name.strip())


def look_alikes(names: Iterable[str]) -> list[list[str]]:
    """The groups of names that differ in case, spaces or width alone, or as ``true``, ``1`` and ``1.0`` do."""
    groups = defaultdict(list)
    for name in sorted(set(names)):
        key = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        key = _AS_NUMBERS.get(key, key)
        if (number := _WHOLE.fullmatch(key)) is not None:
            key = number[1] + number[2] if number[2] else "0"
        groups[key].append(name)
    return [group for group in groups.values() if len(group) > 1]


def class_names(labels: Iterable[str]) -> tuple[str, ...]:
    """Sort the classes: by number if all are whole numbers, else by name."""
    names = set(labels)
    # Python refuses to convert numbers of thousands of digits; such labels are names.
    if all(name.removeprefix("-").isdecimal() and len(name) < 20 for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def class_numbers(labels: Iterable[str], names: Sequence[str]) -> list[int]:
    """Return each label's index in ``names``, which earlier versions did not tidy. Raises `DataError` for others."""
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
    """Shuffle by ``seed`` and hold one of ``every`` rows out, of each class as of all, none of a class of one row."""
    # As scikit-learn counts, whose splitters refuse a class of one row, and data with many small classes.
    order, counts = _shuffled(len(rows), seed), Counter(labels)
    by_class = sorted((row for row in order if counts[labels[row]] > 1), key=labels.__getitem__)
    held = {*by_class[every // 2 :: every]}
    return [rows[row] for row in order if row not in held], [rows[row] for row in order if row in held]


def drawn(parts: Sequence[Sequence[T]], weights: Sequence[float], *, seed: int) -> list[list[T]]:
    """Draw rows of each part by ``seed``, none twice, until one part has no more: their numbers are as the weights."""
    weighted = [*zip(parts, weights, strict=True)]
    most = min(len(part) / weight for part, weight in weighted)
    return [split(part, train_rows=round(most * weight), seed=seed)[0] for part, weight in weighted]


def _shuffled(count: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order
