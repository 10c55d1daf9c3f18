"""The output folder of a training run: the adapter, the processor, and the record, which names the base.

`tunerkit show` reads the record in well under a second, so torch is imported where a base is loaded.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tunerkit.errors import BaseMismatchError, FileError, shown
from tunerkit_transformers.run_folder import NAME as RECORD, placed, read_record
from tunerkit_transformers.task_classes import TASKS

if TYPE_CHECKING:
    from tunerkit_transformers.pretrained import Pretrained

VERSION = 1


@attrs.frozen
class Run:
    """The part of a folder's record that loading needs.

    Attributes:
        folder: The folder.
        task: The task, one of `tunerkit_transformers.task_classes.TASKS`.
        source: The base model: the folder or the hub name that it was loaded from.
        revision: The commit on the hub; None for a folder.
        dtype: The dtype of the base's weights, such as ``"float32"``.
        quantisation: The quantization of the base at loading, one of `QUANTISATIONS`; None without quantization.
        labels: The names of the classes, in the order of the logits.
        seed: The seed of modules that the base's checkpoint lacks.
        record: The whole record.
    """

    folder: Path
    task: str
    source: str
    revision: str | None
    dtype: str
    quantisation: str | None
    labels: tuple[str, ...]
    seed: int
    record: Mapping[str, Any]


def read_run(folder: str | Path) -> Run:
    """Read the record of a folder that ``tunerkit train`` wrote.

    Raises:
        RunError: It is not such a folder, its training is not finished, or its record cannot be read.
        FileError: The record has another version, or lacks a field.
    """
    folder = Path(os.path.expanduser(folder))
    path, record = folder / RECORD, read_record(folder)
    version = record.get("version")
    if version != VERSION:
        raise FileError(f"{path}: has version {shown(version)}, and this tunerkit reads version {VERSION}; update it")
    model, labels = record.get("model"), record.get("labels", [])
    if record.get("task") not in TASKS:
        raise FileError(f"{path}: task: expected one of {', '.join(TASKS)}, got {shown(record.get('task'))}")
    if not isinstance(model, dict) or not isinstance(model.get("source"), str):
        raise FileError(f"{path}: model.source: expected a folder or a name on the hub, got {shown(model)}")
    seed = model.get("seed", 0)
    if type(seed) is not int or not 0 <= seed < 2**64:
        raise FileError(f"{path}: model.seed: expected a whole number from 0 to 2^64 - 1, got {shown(seed)}")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise FileError(f"{path}: labels: expected a list of names, got {shown(labels)}")
    return Run(
        folder=folder,
        task=record["task"],
        source=placed(model["source"], folder),
        revision=model.get("revision"),
        dtype=str(model.get("dtype", "float32")),
        quantisation=None if (name := model.get("quantisation")) is None else str(name),
        labels=tuple(labels),
        seed=seed,
        record=record,
    )


def load_run(run: Run, base: str | Path | None = None) -> "Pretrained":
    """Load the base model of a run, apply its adapter, and load its processor from the run's folder.

    Args:
        run: The run.
        base: The base model's folder or name on the hub, if it has moved.

    Raises:
        ModelError: The base cannot be loaded.
        BaseMismatchError: The adapter was trained on another base.
        FileError: The adapter's file is missing or damaged.
    """
    import tunerkit
    from tunerkit_transformers.pretrained import load_pretrained

    source = str(base) if base is not None else run.source
    if base is None and Path(source).is_absolute() and not Path(source).exists():
        raise FileError(
            f"{run.folder}: the base model was in {source}, which is gone; pass the folder where it is now (base=, or "
            "--base)"
        )
    loaded = load_pretrained(
        run.task,
        source,
        labels=run.labels,
        revision=run.revision if base is None else None,
        dtype=run.dtype,
        seed=run.seed,
        processor_from=run.folder,
        quantisation=run.quantisation,
    )
    try:
        tunerkit.load(loaded.model, run.folder)
    except BaseMismatchError as problem:
        raise BaseMismatchError(
            f"{problem}\n- pass the base that was trained, {run.source} (base=, or --base)"
        ) from None
    loaded.model.eval()
    return loaded
