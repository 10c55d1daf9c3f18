"""The rows of a run: read, checked, and split into those to train on and those held out."""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from rich.console import Console

from tunerkit.errors import cut, shown
from tunerkit.paths import few
from tunerkit_cli import assets
from tunerkit_cli.demo import demo_of
from tunerkit_cli.recipes.recipe import Recipe, files_of
from tunerkit_cli.rows import DataError, Table, class_numbers, look_alikes, read_table, split, split_by_class
from tunerkit_cli.running.telling import say
from tunerkit_cli.tasks import task_of
from tunerkit_cli.tasks.base import Row, Task
from tunerkit_cli.tasks.infer import infer

HELD_OUT_EVERY = 5  # one of five rows
# The split is fixed: the seed changes the training, never the rows it is evaluated on.
SPLIT_SEED = 0


@attrs.frozen
class Data:
    """The rows of a run, and the names of their classes.

    Where a part of the training data is held out, a class may have rows in that part alone. ``columns`` and ``unused``
    are as in `Rows`. ``findings`` are what the record says of the held-out rows.
    """

    train: list[Row]
    held_out: list[Row]
    source: str
    held_out_source: str
    labels: tuple[str, ...]
    columns: Mapping[str, str]
    unused: tuple[str, ...]
    findings: Mapping[str, Any]

    @property
    def parts(self) -> Mapping[str, list[Row]]:
        """The rows by part, under the names in a record."""
        return {"train": self.train, "eval": self.held_out}


@attrs.frozen
class Placed:
    """A row, and where it stands: the number in its file, from 1."""

    row: Row
    source: str
    number: int


@attrs.frozen
class Rows:
    """The checked rows of one or several files, and what the user should know of them.

    ``columns`` are the names in the files of the columns that are used, by ours, and ``unused`` are the other columns.
    """

    source: str
    placed: list[Placed]
    notes: list[str]
    columns: Mapping[str, str]
    unused: tuple[str, ...]

    @property
    def rows(self) -> list[Row]:
        """The rows alone."""
        return [each.row for each in self.placed]


def prepare_data(recipe: Recipe, console: Console, *, by_class: bool = True) -> tuple[Task, Data]:
    """Read the data, find the task, check and split the rows, and print what is odd about them.

    Args:
        recipe: The recipe.
        console: Where it is printed.
        by_class: Whether a fifth of each class is held out. Earlier versions held out a fifth of all rows.
    """
    if recipe.data is None:
        task, read, parts = _demo(recipe, console)
        source, notes = "others of them", read.notes
    else:
        tables = [read_table(Path(path)) for path in files_of(recipe.data)]
        task = task_of(recipe.task or infer(tables[0], recipe.columns), recipe.max_length)
        read = read_rows(task, tables, recipe.columns)
        if recipe.eval_data is None:
            # Not what an earlier version wrote, which held other rows out: the report compares these words.
            by_class = by_class and task.one_class
            share = "a fifth of each class of" if by_class else "a fifth of"
            parts, source, notes = _split(read, by_class=by_class), f"{share} {read.source}", read.notes
        else:
            other = read_rows(task, [read_table(Path(path)) for path in files_of(recipe.eval_data)], recipe.columns)
            parts, source = (read.placed, other.placed), other.source
            notes = list(dict.fromkeys((*read.notes, *other.notes)))
    labels = task.labels(read.rows)
    train, held_out = ([each.row for each in part] for part in parts)
    class_numbers((name for row in held_out for name in task.classes_of(row)), labels)  # refuses unknown ones
    findings, more = _compared(task, *parts)
    for note in (*notes, *_alike(task, read.rows), *more):
        say(console, f"note: {note}")
    return task, Data(train, held_out, read.source, source, labels, read.columns, read.unused, findings)


def _demo(recipe: Recipe, console: Console) -> tuple[Task, Rows, tuple[list[Placed], list[Placed]]]:
    """The task's demo, of which published results have this split."""
    if recipe.eval_data is not None:
        raise DataError("eval_data needs data: the demo has its own held-out sentences; pass --data too")
    task = task_of(recipe.task or "text-classification", recipe.max_length)
    demo = demo_of(task.name, "data")
    table = demo.rows(assets.cache_folder(), lambda text: say(console, text))
    read = read_rows(task, [table], {})
    train, rest = split(read.placed, train_rows=demo.train_rows, seed=SPLIT_SEED)
    return task, read, (train, rest[: demo.held_out_rows])


def read_rows(
    task: Task, tables: Sequence[Table], names: Mapping[str, str], *, predicting: bool = False, renaming: bool = True
) -> Rows:
    """Return the rows of one or several files, in their order; the options are those of `Task.rows`.

    White space around labels is removed, and their Unicode form is NFC.

    Raises:
        DataError: A file's rows do not fit, or files have different columns.
    """
    placed: list[Placed] = []
    shapes: list[dict[str, tuple[str, bool]]] = []  # for each of our columns: its name, and whether it has lists
    changed: Counter[tuple[str, str]] = Counter()
    for table in tables:
        found = task.rows(table, names, predicting=predicting, renaming=renaming)
        rows = [task.tidied(row, changed) for row in found]
        read = task.columns_read(table, names, predicting=predicting)
        shapes.append({each.name: (name, isinstance(rows[0].get(each.name), list)) for each, name in read})
        placed += [Placed(row, table.source, number) for number, row in enumerate(rows, start=1)]
    for table, shape in zip(tables, shapes, strict=True):
        if shape != shapes[0]:
            raise DataError(
                f"{table.source}: has {_described(shape)}, and {tables[0].source} has {_described(shapes[0])}; give "
                "all files of one run the same columns with values of the same kind"
            )
    notes = [f"{table.source}: left out {table.left_out}" for table in tables if table.left_out]
    if changed:
        such = few([f"{shown(old)} as {shown(new)}" for old, new in changed], shown=3)
        notes.append(
            f"labels are read without white space around them and in the Unicode form NFC, which changes "
            f"{changed.total()} of them: {such}"
        )
    columns = {ours: name for ours, (name, _) in shapes[0].items()}
    there = dict.fromkeys(name for table in tables for name in table.columns)
    unused = tuple(name for name in there if name not in columns.values())
    return Rows(" and ".join(table.source for table in tables), placed, notes, columns, unused)


def _described(shape: Mapping[str, tuple[str, bool]]) -> str:
    kinds = {ours: f"column {shown(name)}{', lists' if has_lists else ''}" for ours, (name, has_lists) in shape.items()}
    return ", ".join(f"{ours} ({kind})" for ours, kind in kinds.items())


def _split(read: Rows, *, by_class: bool) -> tuple[list[Placed], list[Placed]]:
    """Hold out a fifth of the rows, or of those of each class."""
    placed = read.placed
    if by_class:
        labels = [each.row["label"] for each in placed]
        parts = split_by_class(placed, labels, every=HELD_OUT_EVERY, seed=SPLIT_SEED)
    else:
        held_out = round(len(placed) / HELD_OUT_EVERY)
        parts = split(placed, train_rows=len(placed) - held_out, seed=SPLIT_SEED)
    if len(parts[1]) < 2:
        raise DataError(
            f"{read.source}: {len(placed)} rows are too few to hold a fifth of them out for evaluation; add rows, or "
            "pass others with --eval-data"
        )
    return parts


def _alike(task: Task, rows: Iterable[Row]) -> list[str]:
    """A note on classes that a reader takes for one; they stay as they are."""
    counts = Counter(name for row in rows for name in task.classes_of(row))
    groups = [" and ".join(f"{shown(name)} ({counts[name]})" for name in group) for group in look_alikes(counts)]
    if not groups:
        return []
    return [
        f"these classes look alike, and are separate ones: {few(groups, shown=5)}; if they mean the same, give them "
        "one name in the data"
    ]


def _compared(task: Task, train: Sequence[Placed], held_out: Sequence[Placed]) -> tuple[dict[str, Any], list[str]]:
    """What the record says of held-out rows that are trained too and of classes in one part alone, and notes on it."""
    labels: dict[Hashable, list[object]] = {}
    for each in train:
        labels.setdefault(task.identity(each.row), []).append(each.row.get(task.label_column))
    keys = [task.identity(each.row) for each in held_out]
    both = [(each, labels[key]) for each, key in zip(held_out, keys, strict=True) if key in labels]
    findings: dict[str, Any] = {"also_trained": len(both)}
    notes = []
    if both:
        first, _ = both[0]
        other = sum(each.row.get(task.label_column) not in known for each, known in both)
        findings["also_trained_with_another_label"] = other
        findings["also_trained_example"] = {"source": first.source, "row": first.number}
        differ = f" ({other} with another label)" if other else ""
        notes.append(
            f"{len(both)} of {len(held_out)} held-out rows {'is' if len(both) == 1 else 'are'} also in the training "
            f"rows{differ}, such as row {first.number} of {first.source}: "
            f"{cut(shown(next(iter(first.row.values()))), 60)}; what is measured there says little of new rows"
        )
    classes = [Counter(name for each in part for name in task.classes_of(each.row)) for part in (train, held_out)]
    for key, here, there, what in (
        ("classes_not_trained", classes[1], classes[0], "in the held-out rows alone, so they cannot be learned"),
        ("classes_not_held_out", classes[0], classes[1], "in the training rows alone, so they are not measured"),
    ):
        alone = sorted({*here} - {*there})
        if alone:
            findings[key] = alone
            notes.append(f"classes {what}: {few([f'{shown(name)} ({here[name]})' for name in alone], shown=10)}")
    return findings, notes
