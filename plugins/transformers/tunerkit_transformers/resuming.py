"""The checkpoint that a training resumes from: a whole one, so that the end is that of the uninterrupted training."""

import json
import os
import re
import typing
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from transformers import Trainer, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from tunerkit import serialization
from tunerkit.errors import FileError, TunerkitWarning
from tunerkit.injection import Tuner, needs_steps
from tunerkit.serialization import folder_of, has_file
from tunerkit_transformers import zero_checkpoints
from tunerkit_transformers.agreement import gathered, union
from tunerkit_transformers.zero_checkpoints import runs_deepspeed

_WEIGHTS = "go on with the weights alone: tunerkit.load(base, checkpoint, trainable=True) starts a new training run"
_SHOWN = 5
_LOGGED = ("loss", "eval_loss", "learning_rate")  # what a training that goes on reads in its log
_CHECKED = ("log_history", "stateful_callbacks")  # by what is in them
_WHOLE_MODEL = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


def choose_checkpoint(trainer: Trainer, tuners: Sequence[Tuner], wanted: Any) -> Any:
    """Return what ``trainer.train`` should resume from.

    The processes of a distributed training may see other files, so each learns what any of them saw. All of them
    return the same checkpoint or raise the same error, and the main process warns. All must call this.

    Args:
        trainer: The trainer that is about to train.
        tuners: The adapters that it drives.
        wanted: What it was asked to resume from: a checkpoint, True for the newest one, or nothing.

    Returns:
        ``wanted`` itself, if it is a whole checkpoint or none at all; for True, the newest whole checkpoint. A warning
        names newer ones that are not whole.

    Raises:
        FileError: The checkpoint that was asked for, or every one, is not whole. The error says what is wrong. Or the
            processes were asked for different checkpoints.
    """
    _refuse_disagreement(wanted)
    if isinstance(wanted, str | os.PathLike):
        checkpoint = Path(wanted)
        seen = _examined(trainer, tuners, checkpoint)
        if seen.problems:
            raise FileError(
                f"{checkpoint} {'; '.join(seen.problems)}; resume from an earlier checkpoint, or {_WEIGHTS}"
            )
        _warn(trainer, [f"{checkpoint} {note}" for note in seen.notes])
        return str(wanted)
    found = _newest_first(Path(str(trainer.args.output_dir))) if wanted is True else []
    if not found:
        return wanted
    checkpoint, notes = _newest_whole(trainer, tuners, found)
    _warn(trainer, notes)
    return str(checkpoint)


def _refuse_disagreement(wanted: Any) -> None:
    """Raise `FileError` in every process if they were asked to resume from different checkpoints.

    A script that looks for the newest checkpoint itself finds none where the folder is another machine's. The folders
    above a checkpoint may differ between machines.
    """
    own = Path(wanted).name if isinstance(wanted, str | os.PathLike) else "the newest" if wanted is True else "nothing"
    asked = gathered(own)
    if len(set(asked)) > 1:
        named = "; ".join(union([[name] for name in asked])[:_SHOWN])
        raise FileError(
            f"the processes were asked to resume from different checkpoints: {named}. Pass the same to each, and let "
            "each machine see the folder"
        )


def _newest_whole(trainer: Trainer, tuners: Sequence[Tuner], found: Sequence[Path]) -> tuple[Path, list[str]]:
    """Return the first whole checkpoint of ``found``, and what to warn of."""
    passed: list[str] = []
    for checkpoint in found:
        seen = _examined(trainer, tuners, checkpoint)
        if not seen.problems:
            listed = "\n- ".join(passed)
            skipped = f"training resumes from {checkpoint}, the newest whole checkpoint, because:\n- {listed}"
            return checkpoint, [*([skipped] if passed else []), *(f"{checkpoint} {note}" for note in seen.notes)]
        passed.append(f"{checkpoint} {'; '.join(seen.problems)}")
    listed = "\n- ".join(passed[:_SHOWN])
    raise FileError(
        f"none of the {len(found)} checkpoints in {found[0].parent} can be resumed from; train without "
        f"resume_from_checkpoint, or {_WEIGHTS}:\n- {listed}"
    )


def _warn(trainer: Trainer, notes: Sequence[str]) -> None:
    for note in notes if trainer.is_world_process_zero() else ():
        warnings.warn(note, TunerkitWarning, stacklevel=4)


def _newest_first(folder: Path) -> list[Path]:
    """Return the checkpoints in ``folder`` that any process sees, the newest first."""
    own = {
        int(match[1]): path.name
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)) and path.is_dir()
    }
    numbered = {step: name for names in gathered(own) for step, name in names.items()}
    return [folder / numbered[step] for step in sorted(numbered, reverse=True)]


@attrs.frozen
class _Examined:
    """What the processes saw in one checkpoint, as the ends of sentences about it.

    Attributes:
        problems: What keeps it from being resumed exactly, or by all processes alike. A whole one has none.
        notes: Why the end will not be that of an uninterrupted training, although the checkpoint is whole.
    """

    problems: list[str]
    notes: list[str]


def _examined(trainer: Trainer, tuners: Sequence[Tuner], checkpoint: Path) -> _Examined:
    own: tuple[list[str], list[str]]
    try:
        own = list(_problems(trainer, tuners, checkpoint)), list(_notes(trainer, checkpoint))
    except OSError as error:  # the other processes wait for an answer
        own = [f"cannot be read: {error}"], []
    everywhere = gathered(own)
    problems = union([problems for problems, _ in everywhere])
    notes = union([notes for _, notes in everywhere])
    # With the optimizer's file on one machine only, its process would go on and the others start anew.
    apart = [note for note in notes if note not in own[1]]
    return _Examined([*problems, *apart], notes)


def _problems(trainer: Trainer, tuners: Sequence[Tuner], checkpoint: Path) -> Iterator[str]:
    """Yield what keeps ``checkpoint`` from being resumed exactly, as the ends of sentences about it."""
    if not checkpoint.is_dir():
        yield "is not a folder"
        return
    state = checkpoint / TRAINER_STATE_NAME
    if not state.is_file():
        yield f"is not complete: writing it was interrupted before {TRAINER_STATE_NAME}"
    elif not _is_state(state):
        yield f"has a damaged {TRAINER_STATE_NAME}"
    yield from _problems_of_adapters(tuners, checkpoint)
    names = _trainer_files(trainer, checkpoint)
    if runs_deepspeed(trainer):
        missing, parts = zero_checkpoints.parts(trainer, checkpoint)
        yield from missing
        if not parts:
            return
        names += [str(part.relative_to(checkpoint)) for part in parts]
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
    if runs_deepspeed(trainer):
        return [*zero_checkpoints.trainer_files(trainer), *states]
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
        elif needs_steps(tuner):
            yield (
                f"has no state.safetensors for adapter {tuner.name!r} (save_only_model?), and method "
                f"{tuner.method!r} cannot resume without it: load the adapter and start a new training run instead"
            )


def _problems_of_file(folder: Path, content: str) -> Iterator[str]:
    try:
        serialization.read(folder, content=content)
    except FileError as error:
        yield f"has a file that cannot be read: {error}"


def _is_state(path: Path) -> bool:
    """Whether a file is a state that a Trainer can go on from: its fields, with values of their types."""
    try:
        found = json.loads(path.read_bytes())
        state: Any = TrainerState(**found)  # Any: it has whatever the file has
    except (ValueError, TypeError, RecursionError):
        return False
    steps = (state.global_step, state.max_steps)
    logs: list[Any] = state.log_history if isinstance(state.log_history, list) else [None]
    hints = typing.get_type_hints(TrainerState)
    return (
        found.keys() >= {"global_step", "max_steps", "epoch", "log_history"}
        and all(_is_of(hints[name], value) for name, value in found.items() if name not in _CHECKED)
        and all(type(each) is int and each >= 0 for each in steps)
        and all(isinstance(each, dict) and type(each.get("step")) is int for each in logs)
        and all(_is_number(each.get(name, 0)) for each in logs for name in _LOGGED)
        and isinstance(state.stateful_callbacks, dict)
    )


def _is_of(hint: Any, value: object) -> bool:
    """Whether a value of JSON is of a type in an annotation. A whole number may be written with a point."""
    kinds = {typing.get_origin(each) or each for each in typing.get_args(hint) or (hint,)}
    return type(value) in kinds or (_is_number(value) and not kinds.isdisjoint((int, float)))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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


def _notes(trainer: Trainer, checkpoint: Path) -> Iterator[str]:
    """Yield why training cannot end as it would have without the interruption, if the checkpoint is whole."""
    if _has_other_processes(trainer, checkpoint):
        yield (
            "was written by another number of processes: the random state starts anew, so the end is not that of an "
            "uninterrupted training"
        )
    if checkpoint.is_dir() and not runs_deepspeed(trainer) and not (checkpoint / OPTIMIZER_NAME).exists():
        yield (
            "has the weights alone (save_only_model): the optimizer, the learning rate's schedule and the random state "
            "start anew, so the end is not that of an uninterrupted training"
        )
