"""Whether a run may use a folder: a new one, that of a run which it replaces, or that of the run which it resumes."""

import os
import shlex
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import attrs

from tunerkit.errors import shown
from tunerkit_cli.folder import CHECKPOINTS, DIGESTS, LIST, LOGS, REPORT, WRITTEN, RunFolder, digests_of
from tunerkit_cli.outputs import OutputError, writing
from tunerkit_cli.recipes.recipe import Recipe, as_stated, to_mapping
from tunerkit_cli.tasks import LANGUAGE, task_of
from tunerkit_transformers.output_folder import RECORD
from tunerkit_transformers.run_folder import placed


def check(folder: RunFolder, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Raise `OutputError` if the folder holds something else, or another run without ``--overwrite``."""
    if resume and overwrite:
        raise OutputError("--resume and --overwrite exclude each other: pass one of them")
    held = sorted(file.name for file in folder.path.iterdir()) if folder.path.is_dir() else []
    kept = [name for name in held if not name.startswith(".")]
    ours = folder.files if kept else None
    if resume:
        # A version that kept no list has left digests or a checkpoint beside its recipe.
        if ours is None and not (folder.has_checkpoint or (folder / DIGESTS).is_file()):
            raise folder.no_run()
        _check_resume(folder, recipe)
        ours = folder.adopted
    elif kept and ours is None:
        named = next((name for name in (RECORD, DIGESTS, LIST) if name in kept), None)
        why = "" if named is None else f" ({LIST} does not say that a run wrote it)"
        raise OutputError(
            f"--out {folder}: the folder holds other files, such as {named or kept[0]}{why}; pass a new or an empty "
            "folder"
        )
    elif ours is not None and not overwrite:
        ended = f"an ended run ({RECORD})" if folder.has_ended else "a run that has not ended"
        how = "" if folder.has_ended else ", --resume to go on with it"
        raise OutputError(f"--out {folder}: holds {ended}; pass --overwrite to replace it{how}, or another folder")
    if ours is not None:
        _refuse_theirs(folder, ours, WRITTEN)


def refuse_processor(folder: RunFolder, processor: Any) -> None:
    """Raise `OutputError` if a file is in the way of a processor's."""
    ours = folder.adopted
    if any(name not in ours for name in os.listdir(folder.path) if (folder / name).is_file()):
        # Only the processor knows the names of its files.
        with tempfile.TemporaryDirectory() as scratch, writing(Path(scratch)):
            processor.save_pretrained(scratch)
            _refuse_theirs(folder, ours, RunFolder(Path(scratch)).inside("."))


def _refuse_theirs(folder: RunFolder, ours: Collection[str], wanted: Collection[str]) -> None:
    """Raise `OutputError` if a file is in the way, or in a checkpoint, which the trainer deletes when it is old."""
    folders = (CHECKPOINTS, LOGS)
    not_folders = [name for name in folders if os.path.islink(folder / name) or os.path.isfile(folder / name)]
    named = [path for path in wanted if os.path.lexists(folder / path)]
    deleted = [path for path in folder.inside(CHECKPOINTS) if path.startswith(f"{CHECKPOINTS}/checkpoint-")]
    if theirs := sorted({*not_folders, *named, *deleted} - {*ours}):
        is_place = theirs[0] in folders
        what = "is a link or a file, where the run has a folder" if is_place else "was not written by the run there"
        raise OutputError(f"--out {folder}: {theirs[0]} {what}, and could be lost; move it, or pass another folder")


def earlier_defaults(task: str | None) -> dict[str, Any]:
    """The arguments of the trainer whose defaults were others in earlier versions, with these defaults."""
    evaluated: dict[str, Any] = {"eval_strategy": "epoch"}
    if task in LANGUAGE:
        return evaluated
    evaluated["per_device_eval_batch_size"] = 32 if task == "embedding" else 64
    return {**evaluated, "learning_rate": 1e-3, "warmup_steps": 0.06, "adam_beta2": 0.999, "max_grad_norm": 1.0}


def _check_resume(folder: RunFolder, recipe: Recipe) -> None:
    """Raise `OutputError` if the run there has ended, or had another recipe or other data."""
    kept = folder.recipe
    if folder.has_ended:
        if (folder / REPORT).exists():
            raise OutputError(f"--out {folder}: this run has ended; pass --overwrite to run it again")
        return  # it was killed before it had its report
    # It imports transformers, which a folder that is refused spares.
    from tunerkit_cli.preparing.trainer import DECIDED, arguments_of, asked_of

    left = ("task", "precision", "train_on_prompts", "samples", "loss")
    recipe = attrs.evolve(recipe, **{name: getattr(kept, name) for name in left if getattr(recipe, name) is None})
    decided = {f"training.{DECIDED}"}  # changes no number
    if kept.task is not None:  # a recipe may leave defaults out, and what the machine decided
        task = task_of(kept.task)
        silent = arguments_of(attrs.evolve(kept, training={}), task)
        earlier = earlier_defaults(kept.task)
        meant = {n: value for n, value in kept.training.items() if value in (silent.get(n), earlier.get(n))}
        if task.batch_counts and "per_device_eval_batch_size" not in recipe.training:
            decided.add("training.per_device_eval_batch_size")  # by the version
        recipe = attrs.evolve(recipe, training={**meant, **asked_of(recipe, task)})
    asked = attrs.evolve(recipe, out=kept.out)
    before, now = (_flat(to_mapping(as_stated(each, folder.path))) for each in (kept, asked))
    different = sorted(name for name in {*before, *now} - decided if before.get(name) != now.get(name))
    if different:
        name = different[0]
        then, here = (shown(each[name]) if each.get(name) is not None else "not set" for each in (before, now))
        raise OutputError(
            f"--resume: {name} was {then} and is {here} now; a run is resumed "
            f"with the same recipe: call tunerkit train --out {shlex.quote(str(folder))} --resume alone"
        )
    _check_data(folder, kept)


def _check_data(folder: RunFolder, recipe: Recipe) -> None:
    """Raise `OutputError` if data has changed since the run began. Runs of earlier versions have no digests."""
    file = folder / DIGESTS
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    before = {placed(path, folder.path): digest for digest, _, path in (line.partition("  ") for line in lines)}
    for path, digest in digests_of(recipe).items():
        if before.get(path, digest) != digest:
            raise OutputError(
                f"--resume: {path} has changed since the run began, so its rows and steps would be others; put the "
                "file back, or pass --overwrite to begin again"
            )


def _flat(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The values by key, those of a section such as ``training`` by ``training.key``."""
    flat: dict[str, Any] = {}
    for name, value in mapping.items():
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return flat
