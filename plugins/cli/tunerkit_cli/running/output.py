"""The output folder of ``tunerkit train``: whether it may be used, and what a run leaves in it from the start."""

import hashlib
import os
import shlex
import tempfile
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs

import tunerkit
from tunerkit.errors import FileError, shown
from tunerkit_cli.outputs import OutputError, publishing, writing as writing_to
from tunerkit_cli.recipes import writing
from tunerkit_cli.recipes.reading import read_recipe
from tunerkit_cli.recipes.recipe import (
    ADALORA,
    Recipe,
    as_placed,
    as_stated,
    files_of,
    to_mapping,
    with_precision,
)
from tunerkit_cli.running import written
from tunerkit_cli.running.written import CARD, CHECKPOINTS, DIGESTS, LIST, LOGS, RECIPE
from tunerkit_cli.tasks import task_of
from tunerkit_transformers.output_folder import RECORD
from tunerkit_transformers.pretrained import Pretrained
from tunerkit_transformers.run_folder import placed, stated

ADAPTER = "adapter.safetensors"
ENVIRONMENT = "environment.json"
REPORT = "report.html"
LEFT_OUT = "left-out.jsonl"  # the rows that do not fit, with drop_bad_rows
# What every run writes beside its processor and its checkpoints.
_WRITTEN = (LIST, RECIPE, DIGESTS, RECORD, ADAPTER, ENVIRONMENT, REPORT, CARD, LEFT_OUT)


def check(folder: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that holds something else, or another run without ``--overwrite``. Nothing is written.

    Raises:
        OutputError: The folder cannot be used; the message says what to pass.
    """
    if resume and overwrite:
        raise OutputError("--resume and --overwrite exclude each other: pass one of them")
    held = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    kept = [name for name in held if not name.startswith(".")]
    ours = written.run_files(folder) if kept else None
    if resume:
        if ours is None:
            raise _no_run(folder)
        _check_resume(folder, recipe)
    elif kept and ours is None:
        named = next((name for name in (RECORD, DIGESTS, LIST) if name in kept), None)
        why = "" if named is None else f" ({named} is not one that a run wrote)"
        raise OutputError(
            f"--out {folder}: the folder holds other files, such as {named or kept[0]}{why}; pass a new or an empty "
            "folder"
        )
    elif ours is not None and not overwrite:
        has_ended = written.has_ended(folder)
        ended = f"an ended run ({RECORD})" if has_ended else "a run that has not ended"
        how = "" if has_ended else ", --resume to go on with it"
        raise OutputError(f"--out {folder}: holds {ended}; pass --overwrite to replace it{how}, or another folder")
    if ours is not None:
        refuse_theirs(folder, ours, _WRITTEN)


def refuse_theirs(folder: Path, ours: Collection[str], wanted: Collection[str]) -> None:
    """Refuse to write over files that the folder's run did not write.

    Args:
        folder: The folder.
        ours: The files of the run.
        wanted: What is going to be written, by paths in the folder.

    Raises:
        OutputError: A file is in the way; or one is in a checkpoint, which the trainer deletes when it is old.
    """
    folders = (CHECKPOINTS, LOGS)
    not_folders = [name for name in folders if os.path.islink(folder / name) or os.path.isfile(folder / name)]
    named = [path for path in wanted if os.path.lexists(folder / path)]
    deleted = [path for path in written.files_in(folder, CHECKPOINTS) if path.startswith(f"{CHECKPOINTS}/checkpoint-")]
    if theirs := sorted({*not_folders, *named, *deleted} - {*ours}):
        is_place = theirs[0] in folders
        what = "is a link or a file, where the run has a folder" if is_place else "was not written by the run there"
        raise OutputError(f"--out {folder}: {theirs[0]} {what}, and could be lost; move it, or pass another folder")


def begin(folder: Path, recipe: Recipe, earlier: Collection[str] = (), *, resume: bool) -> None:
    """Replace an earlier run in the folder, unless it is resumed, and write what resuming reads.

    That is the recipe, and the digest of each file of data, in the form of ``sha256sum``. Files that no run wrote stay,
    and so do the earlier run's adapter and what describes it, until there is a new adapter: see `save`.

    Args:
        folder: The folder.
        recipe: The recipe of the new run.
        earlier: The files of the earlier run, by paths in the folder.
        resume: Whether the run there is resumed.
    """
    if resume:
        written.note(folder, written.run_files(folder) or ())  # an earlier version kept no list
        return
    if earlier:
        gone = {
            path for path in earlier if path in (RECIPE, DIGESTS) or path.startswith((f"{CHECKPOINTS}/", f"{LOGS}/"))
        }
        # First: a folder that is half removed is still a run's.
        written.note(folder, earlier, earlier={*earlier} - gone - {LIST})
        written.remove(folder, gone)
    from tunerkit import serialization

    written.note(folder, [RECIPE, DIGESTS])
    lines = [f"{digest}  {stated(path, folder)}\n" for path, digest in _digests(as_placed(recipe, folder)).items()]
    serialization.replace(folder / DIGESTS, ["".join(lines).encode()])
    serialization.replace(folder / RECIPE, [writing.dump(recipe).encode()])


def refuse_processor(folder: Path, processor: Any) -> None:
    """Refuse a folder where a file is in the way of a processor's. Raises `OutputError`."""
    ours = written.run_files(folder) or frozenset()
    if any(name not in ours for name in os.listdir(folder) if (folder / name).is_file()):
        # Only the processor knows the names of its files.
        with tempfile.TemporaryDirectory() as scratch, writing_to(Path(scratch)):
            processor.save_pretrained(scratch)
            refuse_theirs(folder, ours, written.files_in(Path(scratch), "."))


def save(loaded: Pretrained, folder: Path) -> None:
    """Write a trained adapter and its processor, in place of those of an earlier run in the folder."""
    earlier = written.earlier_files(folder)
    with publishing(folder) as scratch:
        tunerkit.save(loaded.model, scratch)
        loaded.processor.save_pretrained(scratch)
        new = written.files_in(scratch, ".")
        written.note(folder, new)
        written.remove(folder, earlier - new)  # the record first: it is not the new adapter's
    if earlier:
        written.note(folder, (), earlier=())


def has_checkpoint(folder: Path) -> bool:
    """Whether a run in the folder has written a whole checkpoint: the trainer writes its state last."""
    return any((folder / CHECKPOINTS).glob("checkpoint-*/trainer_state.json"))


def settings_begun_with(folder: Path) -> Mapping[str, Any]:
    """The method's settings in the checkpoints of a run, every default written out; none if none can be read."""
    from tunerkit import serialization

    for file in (folder / CHECKPOINTS).glob(f"checkpoint-*/{ADAPTER}"):
        with suppress(FileError):
            return serialization.read(file, content="adapter")[2].config
    return {}


def after_interrupt(folder: Path) -> str:
    """What is in the folder after Ctrl-C and how to go on, as the end of a sentence; empty without a checkpoint."""
    if written.has_ended(folder):
        return f"; the run in {folder} has ended, and its adapter is complete"
    is_earlier = ADAPTER in written.earlier_files(folder)
    if (folder / ADAPTER).is_file() and not is_earlier:
        return f"; the adapter is written to {folder}, for tunerkit.load, and not evaluated"
    still = f"; {folder / ADAPTER} is still that of the earlier run" if is_earlier else ""
    if has_checkpoint(folder):
        return f"{still}; go on with: tunerkit train --out {shlex.quote(str(folder))} --resume"
    return still


def recipe_file(folder: Path) -> Path:
    """The recipe of the run in a folder. Raises `OutputError` if there is none."""
    if not (folder / RECIPE).is_file():
        raise _no_run(folder)
    return folder / RECIPE


def _no_run(folder: Path) -> OutputError:
    return OutputError(f"--out {folder}: there is no run to resume in this folder; leave --resume out to begin one")


def recipe_begun_with(folder: Path) -> Recipe:
    """The recipe of the run in a folder, with its method: without one, it is from before LoRA was the default."""
    kept = as_placed(with_precision(read_recipe(recipe_file(folder))), folder)
    is_silent = kept.method is None and kept.from_adapter is None
    return attrs.evolve(kept, method=ADALORA) if is_silent else kept


def earlier_defaults(task: str | None) -> dict[str, Any]:
    """The arguments of the trainer whose defaults were others in earlier versions, with these defaults."""
    evaluated = {"eval_strategy": "epoch"}
    if task in ("causal-lm", "preference", "seq2seq"):
        return evaluated
    return {**evaluated, "learning_rate": 1e-3, "warmup_steps": 0.06, "adam_beta2": 0.999, "max_grad_norm": 1.0}


def _check_resume(folder: Path, recipe: Recipe) -> None:
    kept = recipe_begun_with(folder)
    if written.has_ended(folder):
        if (folder / REPORT).exists():
            raise OutputError(f"--out {folder}: this run has ended; pass --overwrite to run it again")
        return  # it was killed before it had its report
    # It imports transformers, which a folder that is refused spares.
    from tunerkit_cli.running.trainer import DECIDED, arguments_of, asked_of

    left = ("task", "precision", "train_on_prompts", "samples", "loss")
    recipe = attrs.evolve(recipe, **{name: getattr(kept, name) for name in left if getattr(recipe, name) is None})
    if kept.task is not None:  # a recipe may leave defaults out, and what the machine decided
        task = task_of(kept.task)
        silent = arguments_of(attrs.evolve(kept, training={}), task)
        earlier = earlier_defaults(kept.task)
        meant = {
            n: value for n, value in kept.training.items() if n == DECIDED or value in (silent.get(n), earlier.get(n))
        }
        recipe = attrs.evolve(recipe, training={**meant, **asked_of(recipe, task)})
    asked = attrs.evolve(recipe, out=kept.out)
    before, now = (_flat(to_mapping(as_stated(each, folder))) for each in (kept, asked))
    different = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if different:
        name = different[0]
        then, here = (shown(each[name]) if each.get(name) is not None else "not set" for each in (before, now))
        raise OutputError(
            f"--resume: {name} was {then} and is {here} now; a run is resumed "
            f"with the same recipe: call tunerkit train --out {shlex.quote(str(folder))} --resume alone"
        )
    _check_data(folder, kept)


def _check_data(folder: Path, recipe: Recipe) -> None:
    """Refuse data that has changed since the run began. Runs of earlier versions have no digests."""
    file = folder / DIGESTS
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    before = {placed(path, folder): digest for digest, _, path in (line.partition("  ") for line in lines)}
    for path, digest in _digests(recipe).items():
        if before.get(path, digest) != digest:
            raise OutputError(
                f"--resume: {path} has changed since the run began, so its rows and steps would be others; put the "
                "file back, or pass --overwrite to begin again"
            )


def _digests(recipe: Recipe) -> dict[str, str]:
    """The SHA-256 of each file of data and of the chat template, by path; a folder of images has none."""
    found = {}
    for path in (*files_of(recipe.data), *files_of(recipe.eval_data), *files_of(recipe.chat_template)):
        if Path(path).is_file():
            with open(path, "rb") as file:
                found[path] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _flat(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The values by key, those of a section such as ``training`` by ``training.key``."""
    flat: dict[str, Any] = {}
    for name, value in mapping.items():
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return flat
