"""The checkpoint that a training resumes from: a whole one, so that the end is that of the uninterrupted training."""

import json
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from tunerkit import serialization
from tunerkit.errors import FileError, TunerkitWarning
from tunerkit.injection import Tuner
from tunerkit.integrations.folders import folder_of, has_file

_WEIGHTS = "go on with the weights alone: tunerkit.load(base, checkpoint, trainable=True) starts a new training run"
_WHOLE_MODEL = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


def choose_checkpoint(trainer: Trainer, tuners: Sequence[Tuner], wanted: Any) -> Any:
    """Return what ``trainer.train`` should resume from.

    Args:
        trainer: The trainer that is about to train.
        tuners: The adapters that it drives.
        wanted: What it was asked to resume from: a checkpoint, True for the newest one, or nothing.

    Returns:
        ``wanted`` itself, if it is a whole checkpoint or none at all; for True, the newest whole checkpoint. A warning
        names newer ones that are not whole.

    Raises:
        FileError: The checkpoint that was asked for, or every one, is not whole. The error says what is wrong.
    """
    if isinstance(wanted, str | os.PathLike):
        checkpoint = Path(wanted)
        if problems := list(_problems(trainer, tuners, checkpoint)):
            raise FileError(f"{checkpoint} {'; '.join(problems)}; resume from an earlier checkpoint, or {_WEIGHTS}")
        _warn_of_other_end(trainer, checkpoint)
        return str(wanted)
    found = _newest_first(Path(str(trainer.args.output_dir))) if wanted is True else []
    return _newest_whole(trainer, tuners, found) if found else wanted


def _newest_whole(trainer: Trainer, tuners: Sequence[Tuner], found: Sequence[Path]) -> str:
    passed: list[str] = []
    for checkpoint in found:
        problems = list(_problems(trainer, tuners, checkpoint))
        if problems:
            passed.append(f"{checkpoint} {'; '.join(problems)}")
            continue
        if passed:
            listed = "\n- ".join(passed)
            warnings.warn(
                f"training resumes from {checkpoint}, the newest whole checkpoint, because:\n- {listed}",
                TunerkitWarning,
                stacklevel=5,
            )
        _warn_of_other_end(trainer, checkpoint)
        return str(checkpoint)
    listed = "\n- ".join(passed[:5])
    raise FileError(
        f"none of the {len(found)} checkpoints in {found[0].parent} can be resumed from; train without "
        f"resume_from_checkpoint, or {_WEIGHTS}:\n- {listed}"
    )


def _newest_first(folder: Path) -> list[Path]:
    numbered = {
        int(match[1]): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)) and path.is_dir()
    }
    return [numbered[step] for step in sorted(numbered, reverse=True)]


def _problems(trainer: Trainer, tuners: Sequence[Tuner], checkpoint: Path) -> Iterator[str]:
    """Yield what keeps ``checkpoint`` from being resumed exactly, as the ends of sentences about it."""
    if not checkpoint.is_dir():
        yield "is not a folder"
        return
    state = checkpoint / TRAINER_STATE_NAME
    if not state.is_file():
        yield f"is not complete: writing it was interrupted before {TRAINER_STATE_NAME}"
    elif not _is_json(state):
        yield f"has a damaged {TRAINER_STATE_NAME}"
    yield from _problems_of_adapters(tuners, checkpoint)
    names = _trainer_files(trainer, checkpoint)
    if any((checkpoint / name).exists() for name in names):  # with save_only_model there is none
        for name in names:
            if not (checkpoint / name).is_file():
                yield f"has no {name}"
            elif not _is_whole_archive(checkpoint / name):
                yield f"has a damaged {name}"


def _trainer_files(trainer: Trainer, checkpoint: Path) -> list[str]:
    """Return the names of the files that the Trainer itself reads to go on exactly, and skips if they are missing."""
    scaler = [SCALER_NAME] if trainer.accelerator.scaler is not None else []
    states = [] if _has_other_processes(trainer, checkpoint) else [_random_state_of(trainer)]
    return [OPTIMIZER_NAME, SCHEDULER_NAME, *states, *scaler]


def _random_state_of(trainer: Trainer) -> str:
    own = f"_{trainer.args.process_index}" if trainer.args.world_size > 1 else ""
    return f"rng_state{own}.pth"


def _has_other_processes(trainer: Trainer, checkpoint: Path) -> bool:
    """Whether the checkpoint has random states, but for another number of processes."""
    names = {path.name for path in checkpoint.glob("rng_state*.pth")}
    alone = trainer.args.world_size <= 1
    return bool(names) and ("rng_state.pth" in names) != alone


def _problems_of_adapters(tuners: Sequence[Tuner], checkpoint: Path) -> Iterator[str]:
    folders = {tuner: folder_of(checkpoint, tuners, tuner) for tuner in tuners}
    if not any(has_file(folder, "adapter") for folder in folders.values()) and any(
        (checkpoint / name).exists() for name in _WHOLE_MODEL
    ):
        return  # a whole model, saved before this trainer was attached: the Trainer loads it
    for tuner, folder in folders.items():
        if not has_file(folder, "adapter"):
            yield f"has no adapter.safetensors for adapter {tuner.name!r}"
        else:
            yield from _problems_of_file(folder, "adapter")
        if has_file(folder, "state"):
            yield from _problems_of_file(folder, "state")
        elif tuner.needs_steps:
            yield (
                f"has no state.safetensors for adapter {tuner.name!r} (save_only_model?), and method "
                f"{tuner.method!r} cannot resume without it: load the adapter and start a new training run instead"
            )


def _problems_of_file(folder: Path, content: str) -> Iterator[str]:
    try:
        serialization.read(folder, content=content)
    except FileError as error:
        yield f"has a file that cannot be read: {error}"


def _is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except (ValueError, RecursionError):
        return False


def _is_whole_archive(path: Path) -> bool:
    """Whether a file of `torch.save` is whole: a zip archive with a checksum for each part, or of the older format."""
    if not zipfile.is_zipfile(path):
        return _is_of_older_format(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError):
        return False


def _is_of_older_format(path: Path) -> bool:
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a damaged file may end in any error of the unpickler
        return False
    return True


def _warn_of_other_end(trainer: Trainer, checkpoint: Path) -> None:
    """Warn if the checkpoint is whole, but training cannot end as it would have without the interruption."""
    if _has_other_processes(trainer, checkpoint):
        warnings.warn(
            f"{checkpoint} was written by another number of processes: the random state starts anew, so the end is not "
            "that of an uninterrupted training",
            TunerkitWarning,
            stacklevel=5,
        )
    if not (checkpoint / OPTIMIZER_NAME).exists():
        warnings.warn(
            f"{checkpoint} has the weights alone (save_only_model): the optimizer, the learning rate's schedule and "
            "the random state start anew, so the end is not that of an uninterrupted training",
            TunerkitWarning,
            stacklevel=5,
        )
