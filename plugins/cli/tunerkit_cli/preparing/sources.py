"""The sources of a run's rows: files, folders of images, and data sets of the hub, each at a commit."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Final

import attrs

from tunerkit.errors import cut
from tunerkit_cli.recipes.recipe import Recipe, Source, sources_in
from tunerkit_cli.rows import READERS, DataError, Table, read_table, without_nulls
from tunerkit_transformers.pretrained import closest_path, looks_local

_NAME: Final = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_PART: Final = re.compile(r"\[.*?\]")  # of a split
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")


def pinned(recipe: Recipe, begun: Recipe | None = None) -> Recipe:
    """The recipe with a commit of each data set of the hub: its own, that of the run it resumes, or the newest."""
    before = [] if begun is None else [*sources_in(begun.data), *sources_in(begun.eval_data)]
    data, eval_data = _pinned(recipe.data, before, "train"), _pinned(recipe.eval_data, before)
    return attrs.evolve(recipe, data=data, eval_data=eval_data)


def _pinned(given: Any, before: list[Source], split: str | None = None) -> Any:
    if isinstance(given, list):
        return [_pinned(each, before, split) for each in given]
    source = Source(given) if isinstance(given, str) else given
    if source is None or not _is_on_hub(source):
        return given
    source = attrs.evolve(source, split=source.split or split)
    if _COMMIT.fullmatch(source.revision or ""):
        return source
    place = (source.path, source.name, source.split)
    kept = [each.revision for each in before if (each.path, each.name, each.split) == place and not source.revision]
    return attrs.evolve(source, revision=kept[0] if kept else _commit(source.path, source.name, source.revision))


@cache  # within a command the newest commit stays the same
def _commit(path: str, name: str | None, revision: str | None) -> str:
    return str(_builder(Source(path, name, revision=revision)).hash)


def _is_on_hub(source: Source) -> bool:
    """Whether a source is a data set of the hub, and not a path, which may be mistyped. Raises `DataError`."""
    path, is_name = source.path, _NAME.fullmatch(source.path) is not None
    if not (source.name or source.split or source.revision):
        is_path = looks_local(path) or Path(path).suffix.lower() in READERS or os.path.isdir(Path(path).parent)
        return is_name and not is_path and not closest_path(path)
    if not is_name or os.path.exists(path):
        raise DataError(
            f"{path}: name, split and revision are for data sets of the hub (org/name), and this is "
            f"{'a path that exists here' if os.path.exists(path) else 'no such name'}"
        )
    if source.rows is not None and source.split and source.split != (whole := _PART.sub("", source.split)):
        do = f"exclude each other; write split: {whole}, rows: {source.rows}"
        raise DataError(f"{path}: rows and a part of a split ({source.split}) {do}")
    return True


def read_source(source: Source, *, most: int | None = None) -> Table:
    """Read as `read_table` does, or from the hub, the first ``source.rows``, at most ``most``; a note counts them."""
    path, is_on_hub, wanted = Path(source.path), _is_on_hub(source), source.rows
    if not (is_on_hub or path.suffix or os.path.exists(path)):
        raise DataError(
            f"{path}: no such file or folder{closest_path(source.path)}; for a data set of the hub, write its name, "
            "as in `data: {path: org/name, split: train}`"
        )
    if wanted is not None and os.path.isdir(path):
        raise DataError(f"{path}: rows: {wanted} would read the first class of a folder alone; leave rows out")
    most = min(filter(None, (most, wanted)), default=None)
    table = _read_split(source, most) if is_on_hub else read_table(path, most=most)
    found, note = len(table), table.note
    if wanted is not None:
        note = f"the first {found} rows are read" if found == wanted else f"has {found} of the {wanted} rows asked for"
    return attrs.evolve(table, weight=source.weight, note=note)


def _read_split(source: Source, most: int | None) -> Table:
    from datasets import ClassLabel

    builder, is_stream = _builder(source), source.rows is not None
    with _explained(source.path):
        if not is_stream:
            builder.download_and_prepare()
        opened = builder.as_streaming_dataset if is_stream else builder.as_dataset
        splits = [] if source.split else [*opened()]
        split = source.split or (splits[0] if len(splits) == 1 else None)
        if split is None:
            such = f"{{path: {source.path}, split: {splits[-1]}}}"
            raise DataError(f"{source.path}: has the splits {', '.join(splits)}; say which one it is, as in {such}")
        label = f"{source.path} ({', '.join(filter(None, (source.name, split, builder.hash[:7])))})"
        found = opened(split=split)
        features = found.features or {}  # a stream may not know them
        for name, feature in features.items():
            if _is_medium(feature):
                do = "to classify images, save them into a folder with a subfolder per class"
                raise DataError(f"{label}: column {name!r} has images or sound, which no task reads from the hub; {do}")
        # A stream's own `take` reads on into the next file.
        rows = list(islice(found, most)) if is_stream else found.select(range(len(found))[:most]).to_list()
    for name, feature in features.items():
        if isinstance(classes := getattr(feature, "feature", feature), ClassLabel):
            for row in rows:
                row[name] = _named(row[name], classes)
    if not rows:
        raise DataError(f"{label}: there are no rows in this split; is it the right one?")
    columns = found.column_names or dict.fromkeys(key for row in rows for key in row)  # a stream may not know them
    return Table(label, tuple(columns), tuple(map(without_nulls, rows)))


def _is_medium(feature: Any) -> bool:
    """Whether a feature has images, sound or the like, in lists or mappings too."""
    if isinstance(feature, dict):
        return any(map(_is_medium, feature.values()))
    if (inner := getattr(feature, "feature", None)) is not None:
        return _is_medium(inner)
    return hasattr(feature, "decode_example") and type(feature).__name__ != "Json"  # a value of any form, as in a file


def _named(value: Any, classes: Any) -> Any:
    """The names of classes in place of their numbers, in lists too; -1 stands for no label."""
    if isinstance(value, list):
        return [_named(each, classes) for each in value]
    return None if value in (None, -1) else classes.int2str(value)


def _builder(source: Source) -> Any:
    """What prepares a data set. Offline, it is the newest commit in the cache of ``datasets``, or an error."""
    import datasets

    datasets.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    with _explained(source.path):
        builder = datasets.load_dataset_builder(source.path, source.name, revision=source.revision)
        if type(builder).__name__ == "Cache" and source.revision not in (None, builder.hash):
            there = f"the cache has the commit {builder.hash}, and {source.revision} is asked for"
            raise DataError(f"{source.path}: {there}; load it where the hub can be reached")
    return builder


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Inside the block, what ``datasets`` raises becomes one `DataError`."""
    from datasets import config, exceptions

    absent = f"{path}: there is no such file or folder here, and"
    try:
        yield
    except DataError:
        raise
    except exceptions.DatasetNotFoundError:
        do = "check the name and the revision, or log in with `hf auth login`"
        raise DataError(f"{absent} no data set of this name on the hub that you may read; {do}") from None
    except ConnectionError:
        why = "HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set" if config.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise DataError(f"{absent} no such data set in the cache; {why}; load it once with the hub") from None
    except Exception as problem:  # datasets raises many classes
        said = cut(" ".join(str(problem).split()) or type(problem).__name__, 300)
        raise DataError(f"{path}: cannot be read from the hub: {said}") from problem
