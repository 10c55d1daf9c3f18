"""What is wrong with a run, or with rows for one, as far as it is seen without torch and transformers, at once."""

import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import attrs

import tunerkit
from tunerkit.errors import ConfigError, FileError
from tunerkit_cli.assets import demo_of
from tunerkit_cli.folder import RunFolder
from tunerkit_cli.preparing import resuming
from tunerkit_cli.preparing.sources import pinned, read_source
from tunerkit_cli.recipes.recipe import Recipe, default_method, sources_in, with_home, with_precision
from tunerkit_cli.recipes.trainer_arguments import name_problem
from tunerkit_cli.rows import DataError, Table, read_table
from tunerkit_cli.tasks import TaskError, task_of
from tunerkit_cli.tasks.base import Task, require_package
from tunerkit_cli.tasks.formats import infer, refuse_other, standard
from tunerkit_cli.tasks.metrics import refuse_unfit, refuse_unusable
from tunerkit_cli.tasks.rewards import refuse_engine, refuse_rewards
from tunerkit_cli.tasks.turns import read_template
from tunerkit_transformers.output_folder import read_run
from tunerkit_transformers.pretrained import refuse_missing

_HEAD: Final = 100  # rows of each source, which show its form


def check(recipe: Recipe, *, resume: bool, overwrite: bool, allow_code: bool = False) -> None:
    """Raise `TunerkitError` if a run is refused without torch: by its folder, files, columns, metrics or arguments."""
    recipe = with_home(recipe)
    refuse_unusable(recipe.metric or (), recipe.training.get("metric_for_best_model"), allow_code=allow_code)
    refuse_rewards(recipe.reward or (), None, allow_code=allow_code)
    if "tensorboard" in str(recipe.training.get("report_to")) and find_spec("tensorboardX") is None:
        require_package("tensorboard", "training.report_to: tensorboard", "tensorboard")
    folder = RunFolder(Path(recipe.out))
    if resume:
        folder.recipe_file()  # raises if there is none
        return
    if recipe.metric_rows is not None and not recipe.metric:
        raise ConfigError(["metric_rows: no metric is measured on them; set metric too, or leave metric_rows out"])
    resuming.check(folder, recipe, resume=False, overwrite=overwrite)
    if recipe.from_adapter is not None:
        refuse_absent(recipe.from_adapter)
    if recipe.data is None and recipe.eval_data is not None:
        raise DataError("eval_data needs data: the demo has its own held-out sentences; pass --data too")
    if recipe.model is not None:
        refuse_missing(recipe.model)
    if (template := recipe.chat_template) is not None:
        read_template(template)
    recipe = pinned(recipe)
    tables, others = (
        [read_source(each, most=_HEAD) for each in sources_in(data)] for data in (recipe.data, recipe.eval_data)
    )
    if (task := _task_of(recipe, tables)) is not None:
        if found := [*filter(None, (name_problem(name, task.name) for name in recipe.training))]:
            raise ConfigError(found)
        refuse_unfit(recipe.metric or (), task)
        refuse_rewards(recipe.reward or (), task, allow_code=allow_code)
        refuse_engine(recipe.engine, task)
        whole = [each for each in (*tables, *others) if not (recipe.drop_bad_rows and len(each) == _HEAD)]
        _refuse_columns(task, whole, recipe.columns)


def _task_of(recipe: Recipe, tables: Sequence[Table]) -> Task | None:
    """The task that a recipe or its data names; None if the adapter that it goes on from, or later rows, may say it."""
    if recipe.task is None and recipe.from_adapter is not None:
        return None
    try:
        name = recipe.task or (infer(tables[0], recipe.columns) if tables else "text-classification")
    except TaskError:
        if tables and len(tables[0]) == _HEAD:  # there may be more
            return None
        raise
    if not tables:
        demo_of(name, "data")
    if recipe.model is None and recipe.from_adapter is None:
        demo_of(name, "model")
    return task_of(name)


def _refuse_columns(
    task: Task, tables: Iterable[Table], names: Mapping[str, str], *, predicting: bool = False, renaming: bool = True
) -> None:
    """Raise `DataError` if a table lacks a column that the task needs; the options are those of `Task.rows`."""
    for given in tables:
        if not predicting:
            refuse_other(given, names, task.name)
        task.columns_read(standard(given, names, task.name), names, predicting=predicting, renaming=renaming)


def refuse_absent(source: str) -> None:
    """Raise `FileError` if there is no adapter to go on from."""
    if not os.path.exists(os.path.expanduser(source)):
        raise FileError(
            f"--from {source}: no such file or folder; pass an output folder of `tunerkit train`, a file or folder "
            "that tunerkit.save wrote, or an adapter of another program"
        )


def check_rows(folder: Path, files: Sequence[Path], columns: Mapping[str, str], *, predicting: bool) -> None:
    """Raise `TunerkitError` if there is no run, or files lack a column for it; ``columns`` has other names of some."""
    run = read_run(folder)
    names = {**run.record.get("recipe", {}).get("columns", {}), **columns}
    tables = [read_table(path, predicting=predicting, most=_HEAD) for path in files]
    _refuse_columns(task_of(run.task), tables, names, predicting=predicting, renaming=False)


def completed(recipe: Recipe, *, resume: bool) -> Recipe:
    """The recipe as it is run, with full paths, one precision, commits and method; imports torch, not transformers."""
    recipe = with_precision(with_home(recipe))
    begun = RunFolder(Path(recipe.out)).recipe if resume else None
    recipe = pinned(recipe, begun)
    from tunerkit import hooks

    method = recipe.method
    if method is None and recipe.from_adapter is None:
        method = default_method(has_data=recipe.data is not None) if begun is None else begun.method
    if method is not None:
        recipe = attrs.evolve(recipe, method=hooks.registry.named(method))
    if recipe.method is not None and recipe.from_adapter is None:
        tunerkit.structure(recipe.method, recipe.config)
    return recipe
