"""The rows of a run: read, checked, and split into those to train on and those held out."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import attrs
from rich.console import Console

from tunerkit.errors import cut, shown
from tunerkit.paths import few
from tunerkit_cli.assets import cache_folder, demo_of
from tunerkit_cli.preparing.sources import read_source
from tunerkit_cli.recipes.recipe import Recipe, sources_in
from tunerkit_cli.rows import (
    BadRowsError,
    DataError,
    Table,
    class_numbers,
    drawn,
    look_alikes,
    split,
    split_by_class,
    tidy,
)
from tunerkit_cli.tasks import task_of
from tunerkit_cli.tasks.base import Row, Task
from tunerkit_cli.tasks.formats import infer, refuse_other, standard
from tunerkit_cli.tasks.turns import read_template
from tunerkit_cli.telling import say

HELD_OUT_EVERY = 5  # one of five rows
# The split is fixed: the seed changes the training, never the rows it is evaluated on.
SPLIT_SEED = 0


@attrs.frozen
class Data:
    """The rows of a run, and the names of their classes; what is not said here is as in `Rows`."""

    train: list[Row]
    held_out: list[Row]
    source: str
    held_out_source: str
    labels: tuple[str, ...]  # where a part of the training data is held out, a class may have rows in it alone
    columns: Mapping[str, str]
    unused: tuple[str, ...]
    findings: Mapping[str, Any]  # what the record says of the held-out rows
    left_out: Sequence[Mapping[str, Any]] = ()

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
    """The checked rows of one or several files, and what the user should know of them."""

    source: str
    placed: list[Placed]
    notes: list[str]
    columns: Mapping[str, str]  # the names in the files of the columns that are used, by ours
    unused: tuple[str, ...]  # the other columns
    left_out: list[dict[str, Any]]  # of each row that does not fit: its file, its number, and why
    classes: frozenset[str]  # as in the files

    @property
    def rows(self) -> list[Row]:
        """The rows alone."""
        return [each.row for each in self.placed]


def prepare_data(recipe: Recipe, console: Console, *, by_class: bool = True) -> tuple[Task, Data]:
    """Read the data, find the task, check and split the rows, by class or as earlier versions did, and print notes."""
    if recipe.chat_template is not None:
        read_template(recipe.chat_template)  # which is needed much later
    if recipe.data is None:
        task, read, parts = _demo(recipe, console)
        source, notes, left_out = "others of them", read.notes, read.left_out
    else:
        tables = [read_source(each) for each in sources_in(recipe.data)]
        task = task_of(recipe.task or infer(tables[0], recipe.columns), recipe.max_length)
        options: Any = {"drop": recipe.drop_bad_rows, "label_map": recipe.label_map}
        read = read_rows(task, tables, recipe.columns, **options)
        if idle := [old for old in recipe.label_map if old not in read.classes]:
            there = few([shown(name) for name in sorted(read.classes)], shown=10) or "none"
            raise DataError(f"label_map: no row has the label {shown(idle[0])}; the labels are {there}")
        left_out = read.left_out
        if recipe.eval_data is None:
            # Not what an earlier version wrote, which held other rows out: the report compares these words.
            by_class = by_class and task.one_class
            share = "a fifth of each class of" if by_class else "a fifth of"
            parts, source, notes = _split(read, by_class=by_class), f"{share} {read.source}", read.notes
        else:
            held = [read_source(each) for each in sources_in(recipe.eval_data)]
            other = read_rows(task, held, recipe.columns, **options)
            parts, source = (read.placed, other.placed), other.source
            left_out = read.left_out + other.left_out
            notes = list(dict.fromkeys((*read.notes, *other.notes)))
    for note in notes:  # at once: they say what is wrong with the classes of a part of the rows
        say(console, f"note: {note}")
    labels = task.labels(read.rows)
    train, held_out = ([each.row for each in part] for part in parts)
    class_numbers((name for row in held_out for name in task.classes_of(row)), labels)  # refuses unknown ones
    findings, more = _compared(task, *parts)
    for note in (*_alike(task, read.rows), *more):
        say(console, f"note: {note}")
    return task, Data(train, held_out, read.source, source, labels, read.columns, read.unused, findings, left_out)


def _demo(recipe: Recipe, console: Console) -> tuple[Task, Rows, tuple[list[Placed], list[Placed]]]:
    """The task's demo, of which published results have this split."""
    task = task_of(recipe.task or "text-classification", recipe.max_length)
    demo = demo_of(task.name, "data")
    read = read_rows(task, [demo.rows(cache_folder(), lambda text: say(console, text))], {})
    train, rest = split(read.placed, train_rows=demo.train_rows, seed=SPLIT_SEED)
    return task, read, (train, rest[: demo.held_out_rows])


def _drawn(tables: Sequence[Table], parts: list[list[Placed]]) -> tuple[list[list[Placed]], str]:
    """The rows that are drawn of files with weights, and how many. Raises `DataError` if a file would give none."""
    found = drawn(parts, [table.weight for table in tables if table.weight is not None], seed=SPLIT_SEED)
    told = []
    for some, own in zip(found, parts, strict=True):
        if not some:
            raise DataError(
                f"{own[0].source}: its weight draws none of its {len(own)} rows, as the others have too few; raise its "
                "weight, or leave it out"
            )
        told.append(f"{len(some)} of {len(own)} rows of {own[0].source}")
    return found, f"drawn by weight: {', '.join(told)}"


def read_rows(
    task: Task,
    tables: Sequence[Table],
    names: Mapping[str, str],
    *,
    predicting: bool = False,
    renaming: bool = True,
    drop: bool = False,  # rows that do not fit
    label_map: Mapping[str, str] = MappingProxyType({}),  # other names of labels
) -> Rows:
    """Return the checked rows of files, in their order; ``names`` and the next two are those of `Task.rows`."""
    parts: list[list[Placed]] = []
    shapes: list[str] = []  # in words: for each of our columns its name, and whether it has lists
    changed: Counter[tuple[str, str]] = Counter()
    problems: list[BadRowsError] = []
    classes: set[str] = set()
    notes: list[str] = []
    columns: dict[str, str] = {}
    for given in tables:
        if not predicting and (note := refuse_other(given, names, task.name)):
            notes.append(note)
        table, found, more = _fitting(
            partial(task.rows, names=names, predicting=predicting, renaming=renaming),
            standard(given, names, task.name),
            drop=drop,
        )
        problems += more
        read = task.columns_read(table, names, predicting=predicting)
        columns = columns or {ours: table.made.get(name, name) for ours, name in read.items()}
        names_in = [name for row in found for name in task.classes_of(row)]
        changed.update((name, tidy(name)) for name in names_in if name != tidy(name))
        classes |= {*map(tidy, names_in)}
        rows = [task.renamed(row, lambda name: label_map.get(tidy(name), tidy(name))) for row in found]
        kinds = {ours: ", lists" if isinstance(rows[0].get(ours), list) else "" for ours in read}
        shapes.append(", ".join(f"{ours} (column {shown(name)}{kinds[ours]})" for ours, name in read.items()))
        parts.append([Placed(row, table.source, table.number(place)) for place, row in enumerate(rows)])
    _refuse_unlike(tables, shapes)
    counts = [f"{len(each.bad)} row{'' if len(each.bad) == 1 else 's'}" for each in problems]
    notes += [f"left out {count}: {each.said}" for count, each in zip(counts, problems, strict=True)]
    notes += [f"{table.source}: {table.note}" for table in tables if table.note]
    if changed:
        such = few([f"{shown(old)} as {shown(new)}" for old, new in changed], shown=3)
        notes.append(
            f"labels are read without white space around them and in the Unicode form NFC, which changes "
            f"{changed.total()} of them: {such}"
        )
    if any(table.weight is not None for table in tables):
        parts, told = _drawn(tables, parts)
        notes.append(told)
    there = dict.fromkeys(name for table in tables for name in table.columns)
    used = {part for name in columns.values() for part in (name, *name.split(" + "))}
    unused = tuple(name for name in there if name not in used)
    source, left_out = " and ".join(table.source for table in tables), [row for each in problems for row in each.listed]
    return Rows(source, [each for part in parts for each in part], notes, columns, unused, left_out, frozenset(classes))


def _fitting(
    rows_of: Callable[[Table], list[Row]], table: Table, *, drop: bool
) -> tuple[Table, list[Row], list[BadRowsError]]:
    """A table and its rows; with ``drop``, without those that do not fit, and what is wrong with them."""
    try:
        return table, rows_of(table), []
    except BadRowsError as problem:
        if not drop or len(problem.bad) == len(table):
            raise
        kept = table.without(problem.bad)
        return kept, rows_of(kept), [problem]


def _refuse_unlike(tables: Sequence[Table], shapes: Sequence[str]) -> None:
    """Raise `DataError` if files have different columns, or lists in some of them alone."""
    for table, shape in zip(tables, shapes, strict=True):
        if shape != shapes[0]:
            raise DataError(
                f"{table.source}: has {shape}, and {tables[0].source} has {shapes[0]}; give all files of one run the "
                "same columns with values of the same kind"
            )


def _split(read: Rows, *, by_class: bool) -> tuple[list[Placed], list[Placed]]:
    """Hold out a fifth of the rows, or of those of each class."""
    placed = read.placed
    if by_class:
        parts = split_by_class(placed, [each.row["label"] for each in placed], every=HELD_OUT_EVERY, seed=SPLIT_SEED)
    else:
        parts = split(placed, train_rows=len(placed) - round(len(placed) / HELD_OUT_EVERY), seed=SPLIT_SEED)
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
