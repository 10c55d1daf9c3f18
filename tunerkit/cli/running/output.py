"""The output folder of ``tunerkit train``: whether it may be used, and what a run leaves in it from the start."""

import hashlib
import shlex
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import attrs

from tunerkit import serialization
from tunerkit.cli.outputs import OutputError
from tunerkit.cli.recipes import writing
from tunerkit.cli.recipes.reading import read_recipe
from tunerkit.cli.recipes.recipe import Recipe, files_of, to_mapping, with_full_paths, with_precision
from tunerkit.errors import shown
from tunerkit.integrations.output_folder import RECORD

RECIPE = "recipe.yaml"
DIGESTS = "data.sha256"
CHECKPOINTS = "checkpoints"
LOGS = "logs"  # TensorBoard's
PICTURES = "pictures"
# Removed before a new run begins, so that the folder never mixes two runs.
_WRITTEN = (RECORD, "adapter.safetensors", "environment.json", "report.html")


def check(folder: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that holds something else, or another run without ``--overwrite``. Nothing is written.

    Raises:
        OutputError: The folder cannot be used; the message says what to pass.
    """
    if resume and overwrite:
        raise OutputError("--resume and --overwrite exclude each other: pass one of them")
    held = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    kept = [name for name in held if not name.startswith(".")]
    if resume:
        _check_resume(folder, recipe)
    elif kept and not _is_ours(kept):
        raise OutputError(
            f"--out {folder}: the folder holds other files, such as {kept[0]}; pass a new or an empty folder"
        )
    elif kept and not overwrite:
        ended = f"an ended run ({RECORD})" if RECORD in kept else "a run that has not ended"
        how = "" if RECORD in kept else ", --resume to go on with it"
        raise OutputError(f"--out {folder}: holds {ended}; pass --overwrite to replace it{how}, or another folder")


def _is_ours(names: Collection[str]) -> bool:
    """Whether a folder with these files is a run's: a recipe alone is one that somebody wrote, or keeps there."""
    return RECORD in names or DIGESTS in names or {RECIPE, CHECKPOINTS} <= {*names}


def begin(folder: Path, recipe: Recipe, *, resume: bool) -> None:
    """Remove an earlier run from the folder, unless it is resumed, and write what resuming reads.

    That is the recipe, and the digest of each file of data, in the form of ``sha256sum``.
    """
    if resume:
        return
    for name in (CHECKPOINTS, LOGS, PICTURES):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in _WRITTEN:  # the other files of a run are replaced by the new ones
        (folder / name).unlink(missing_ok=True)
    lines = [f"{digest}  {path}\n" for path, digest in _digests(recipe).items()]
    # First, because it says that the folder is a run's.
    serialization.replace(folder / DIGESTS, ["".join(lines).encode()])
    serialization.replace(folder / RECIPE, [writing.dump(recipe).encode()])


def has_checkpoint(folder: Path) -> bool:
    """Whether a run in the folder has written a whole checkpoint: the trainer writes its state last."""
    return any((folder / CHECKPOINTS).glob("checkpoint-*/trainer_state.json"))


def after_interrupt(folder: Path) -> str:
    """What is in the folder after Ctrl-C and how to go on, as the end of a sentence; empty without a checkpoint."""
    if (folder / RECORD).is_file():
        return f"; the run in {folder} has ended, and its adapter is complete"
    if has_checkpoint(folder):
        return f"; go on with: tunerkit train --out {shlex.quote(str(folder))} --resume"
    return ""


def recipe_file(folder: Path) -> Path:
    """The recipe of the run in a folder. Raises `OutputError` if there is none."""
    if not (folder / RECIPE).is_file():
        raise OutputError(f"--out {folder}: there is no run to resume in this folder; leave --resume out to begin one")
    return folder / RECIPE


def _check_resume(folder: Path, recipe: Recipe) -> None:
    kept = with_precision(read_recipe(recipe_file(folder)))
    if (folder / RECORD).is_file():
        raise OutputError(f"--out {folder}: this run has ended; pass --overwrite to run it again")
    left = ("task", "precision", "train_on_prompts")
    recipe = attrs.evolve(recipe, **{name: getattr(kept, name) for name in left if getattr(recipe, name) is None})
    asked = attrs.evolve(with_full_paths(recipe), out=kept.out)
    before, now = (_flat(to_mapping(each)) for each in (kept, asked))
    different = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if different:
        name = different[0]
        raise OutputError(
            f"--resume: {name} was {shown(before.get(name))} and is {shown(now.get(name))} now; a run is resumed "
            f"with the same recipe: call tunerkit train --out {shlex.quote(str(folder))} --resume alone"
        )
    _check_data(folder, kept)


def _check_data(folder: Path, recipe: Recipe) -> None:
    """Refuse data that has changed since the run began. Runs of earlier versions have no digests."""
    file = folder / DIGESTS
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    before = {path: digest for digest, _, path in (line.partition("  ") for line in lines)}
    for path, digest in _digests(recipe).items():
        if before.get(path, digest) != digest:
            raise OutputError(
                f"--resume: {path} has changed since the run began, so its rows and steps would be others; put the "
                "file back, or pass --overwrite to begin again"
            )


def _digests(recipe: Recipe) -> dict[str, str]:
    """The SHA-256 of each file of data, by path; a folder of images has none."""
    found = {}
    for path in (*files_of(recipe.data), *files_of(recipe.eval_data)):
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
