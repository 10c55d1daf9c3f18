"""Read the facts about the base model from an adapter's files: a run's folder, tunerkit's file or another format."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs
from safetensors import SafetensorError, safe_open

from tunerkit.errors import FileError, PluginError, shown
from tunerkit.plugin import Description, Format
from tunerkit.plugin.trainers import file_at, format_at, gather_formats, is_foreign, read
from tunerkit_transformers.output_folder import RECORD, read_run
from tunerkit_transformers.run_folder import RECIPE
from tunerkit_transformers.task_classes import TASKS

_UNREADABLE = (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)


@attrs.frozen
class BaseFacts:
    """The known facts about an adapter's base. A field is empty if the files lack it.

    Attributes:
        source: The folder or the hub name of the base.
        kind: The name of the base's class in transformers.
        labels: The number of classes of the base's head.
        revision: The commit on the hub.
        seed: The seed of newly initialized modules.
        paths: The paths of some of the base's modules.
        shapes: The shapes of some of the base's parameters, by name.
        copies: The shapes of parameters that the adapter replaces, by name. In the base, a head may have another number
            of classes.
    """

    source: str = ""
    kind: str = ""
    labels: int = 0
    revision: str | None = None
    seed: int = 0
    paths: Sequence[str] = ()
    shapes: Mapping[str, Sequence[int]] = attrs.field(factory=dict)
    copies: Mapping[str, Sequence[int]] = attrs.field(factory=dict)


def is_run(path: str) -> bool:
    """Whether ``path`` is the output folder of a finished ``tunerkit train``."""
    return os.path.isfile(os.path.join(path, RECORD))  # pathlib's raises where a name is too long


def holds_adapter(path: str) -> bool:
    """Whether ``path`` has an adapter: tunerkit's file, even a damaged one, or files in an installed format."""
    return _is_file(file_at(path, "adapter")) or format_at(path) is not None


def has_no_record(path: str) -> bool:
    """Whether ``path`` is not an output folder of ``tunerkit train``, neither of a finished nor an unfinished run."""
    has_adapter = holds_adapter(path) or is_foreign(path)
    return not is_run(path) and (has_adapter or not _is_file(Path(path) / RECIPE))


def base_facts(path: str) -> BaseFacts:
    """Read the facts about the base from the adapter's files at ``path``.

    Raises:
        FileError: No adapter is there, or its files are damaged.
    """
    format = format_at(path)
    if format is not None:
        return _of_format(format, path)
    if is_run(path):
        return _of_run(path)
    refuse_absent(path)
    try:
        return _of_header(file_at(path, "adapter"))
    except _UNREADABLE:
        read(path, content="adapter")  # raises an error with the reason
        return BaseFacts()


def _of_header(file: Path) -> BaseFacts:
    """Read only the header, since loading checks the rest. docs/concepts/files.md explains its fields."""
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["tunerkit"])
        stored = {name: tuple(opened.get_slice(name).get_shape()) for name in map(str, opened.keys())}
    return BaseFacts(
        paths=tuple(map(str, header["targets"])),
        shapes={name: tuple(map(int, entry["shape"])) for name, entry in header["base"].items()},
        copies={
            f"{place}.{name.removeprefix(f'{place}.copy.')}": shape
            for place in map(str, header["copies"])
            for name, shape in stored.items()
            if name.startswith(f"{place}.copy.")
        },
    )


def description_at(format: Format, path: str) -> Description | None:
    """Return a format's description of the files at ``path``; None if it has none.

    Raises:
        FileError: The files are damaged.
    """
    if format.describe is None:
        return None
    found: object = format.describe(Path(path))  # the plugin may return anything
    if not isinstance(found, Description):
        raise PluginError(
            f"describe of format {format.name!r} returned {shown(found)}; it must return a tunerkit.plugin.Description"
        )
    return found


def _of_format(format: Format, path: str) -> BaseFacts:
    found = description_at(format, path)
    if found is None:
        return BaseFacts()
    revision = found.settings.get("revision")
    return BaseFacts(
        source=found.base,
        kind=found.model_class,
        labels=found.labels,
        revision=revision if isinstance(revision, str) else None,
        paths=(*found.ranks, *found.copies),
    )


def _of_run(path: str) -> BaseFacts:
    run = read_run(path)
    classes = TASKS[run.task]
    labels = len(run.labels) or (1 if classes.problem == "regression" else 0)
    return BaseFacts(source=run.source, kind=classes.model, labels=labels, revision=run.revision, seed=run.seed)


def refuse_absent(path: str) -> None:
    """Raise `FileError` if nothing at ``path`` can be an adapter."""
    if holds_adapter(path) or is_foreign(path):
        return
    place = Path(path)
    if (place / "config.json").is_file():
        what = "it is the folder of a model"
    elif not place.exists():
        what = "there is no such folder or file"
    else:
        what = "no installed format knows its files" if place.is_dir() else "it is a file of another kind"
    formats = ", ".join(sorted(gather_formats())) or "none (each is a distribution, such as tunerkit-peft)"
    raise FileError(
        f"{path} holds no adapter: {what}. Pass a folder with adapter.safetensors, or an adapter in another format; "
        f"installed: {formats}"
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file system allows
        return False
