"""The rows of a run: read, checked, and split into those to train on and those held out."""

from collections.abc import Mapping
from pathlib import Path

import attrs
from rich.console import Console

from tunerkit.cli import assets
from tunerkit.cli.demo import demo_of
from tunerkit.cli.recipes.recipe import Recipe
from tunerkit.cli.rows.labels import split
from tunerkit.cli.rows.reading import DataError, Table, read_table
from tunerkit.cli.running.telling import say
from tunerkit.cli.tasks import task_of
from tunerkit.cli.tasks.base import Row, Task
from tunerkit.cli.tasks.infer import infer

HELD_OUT_SHARE = 0.2
# The split is fixed: the seed changes the training, never the rows it is evaluated on.
SPLIT_SEED = 0


@attrs.frozen
class Data:
    """The rows of a run, and the names of their classes.

    Where a part of the training data is held out, a class may have rows in that part alone. ``columns`` are the names
    in the training data of the columns that are used, by ours, and ``unused`` are its other columns.
    """

    train: list[Row]
    held_out: list[Row]
    source: str
    held_out_source: str
    labels: tuple[str, ...]
    columns: Mapping[str, str]
    unused: tuple[str, ...]

    @property
    def parts(self) -> Mapping[str, list[Row]]:
        """The rows by part, under the names in a record."""
        return {"train": self.train, "eval": self.held_out}


def prepare_data(recipe: Recipe, console: Console) -> tuple[Task, Data]:
    """Read the data, find the task, and check and split the rows."""
    if recipe.data is None:
        if recipe.eval_data is not None:
            raise DataError("eval_data needs data: the demo has its own held-out sentences; pass --data too")
        task = task_of(recipe.task or "text-classification", recipe.max_length)
        demo = demo_of(task.name, "data")
        table = demo.rows(assets.cache_folder(), lambda text: say(console, text))
        train_rows, rest = split(task.rows(table, {}), train_rows=demo.train_rows, seed=SPLIT_SEED)
        labels = task.labels(train_rows)
        held_out_rows, columns = rest[: demo.held_out_rows], _columns(task, table, {})
        return task, Data(train_rows, held_out_rows, table.source, "others of them", labels, *columns)
    table = read_table(Path(recipe.data))
    task = task_of(recipe.task or infer(table, recipe.columns), recipe.max_length)
    rows = task.rows(table, recipe.columns)
    labels, columns = task.labels(rows), _columns(task, table, recipe.columns)
    if recipe.eval_data is not None:
        other = read_table(Path(recipe.eval_data))
        held_out_rows = task.rows(other, recipe.columns)
        task.check_classes(held_out_rows, labels)
        return task, Data(rows, held_out_rows, table.source, other.source, labels, *columns)
    held_out = round(HELD_OUT_SHARE * len(rows))
    if held_out < 2:
        raise DataError(
            f"{table.source}: {len(rows)} rows are too few to hold a fifth of them out for evaluation; add rows, or "
            "pass others with --eval-data"
        )
    train_rows, rest = split(rows, train_rows=len(rows) - held_out, seed=SPLIT_SEED)
    return task, Data(train_rows, rest, table.source, f"a fifth of {table.source}", labels, *columns)


def _columns(task: Task, table: Table, names: Mapping[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """The names of the columns that a task reads, by ours, and the columns that it does not read."""
    read = {each.name: name for each, name in task.columns_read(table, names)}
    return read, tuple(name for name in table.columns if name not in read.values())
