"""Choose a complete checkpoint to resume from, so that the result equals an uninterrupted training's."""

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

from tunerkit.errors import FileError, TunerkitWarning
from tunerkit.plugin import Tuner, method_record
from tunerkit.plugin.trainers import file_at, folder_of, read
from tunerkit_transformers import zero_checkpoints
from tunerkit_transformers.agreement import gathered, union
from tunerkit_transformers.zero_checkpoints import runs_deepspeed

_WEIGHTS = "continue with the weights alone: tunerkit.load(base, checkpoint, trainable=True) starts a new training run"
_SHOWN = 5
_LOGGED = ("loss", "eval_loss", "learning_rate")  # the values in the log that a resumed training reads
_CHECKED = ("log_history", "stateful_callbacks")  # whose contents are checked, and not only the type
_WHOLE_MODEL = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


def choose_checkpoint(trainer: Trainer, tuners: Sequence[Tuner], wanted: Any) -> Any:
    """Return the checkpoint for ``trainer.train`` to resume from.

    Ranks may see different files, so they exchange their findings. All of them return the same checkpoint or raise the
    same error, and the main process warns. All ranks must call this.

    Args:
        trainer: The trainer that is about to train.
        tuners: The adapters that it drives.
        wanted: The argument of ``trainer.train``: a checkpoint, True for the newest one, or None.

    Returns:
        ``wanted`` itself, if it is a complete checkpoint or None; for True, the newest complete checkpoint. A warning
        names newer, incomplete ones.

    Raises:
        FileError: The checkpoint, or for True every checkpoint, is incomplete; the error lists the reasons. Or ranks
            were given different checkpoints.
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
    """Raise `FileError` on every rank if they were given different checkpoints.

    This happens if each machine's script searches for the newest checkpoint, and only one machine has the folder. Only
    the checkpoints' names are compared: parent folders may differ between machines.
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
    """Return the first complete checkpoint of ``found``, and warnings. Raises `FileError` if there is none."""
    passed: list[str] = []
    for checkpoint in found:
        seen = _examined(trainer, tuners, checkpoint)
        if not seen.problems:
            listed = "\n- ".join(passed)
            skipped = f"training resumes from {checkpoint}, the newest complete checkpoint, because:\n- {listed}"
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
    """Return the checkpoints in ``folder`` that any rank sees, the newest first."""
    own = {
        int(match[1]): path.name
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)) and path.is_dir()
    }
    numbered = {step: name for names in gathered(own) for step, name in names.items()}
    return [folder / numbered[step] for step in sorted(numbered, reverse=True)]


@attrs.frozen
class _Examined:
    """The findings of all ranks about one checkpoint, as sentence fragments that follow its path.

    Attributes:
        problems: The reasons why not all ranks can resume from it exactly; empty for a complete checkpoint.
        notes: The reasons why resuming works, but the result will differ from an uninterrupted training's.
    """

    problems: list[str]
    notes: list[str]


def _examined(trainer: Trainer, tuners: Sequence[Tuner], checkpoint: Path) -> _Examined:
    own: tuple[list[str], list[str]]
    try:
        own = list(_problems(trainer, tuners, checkpoint)), list(_notes(trainer, checkpoint))
    except OSError as error:  # the other ranks wait in a collective
        own = [f"cannot be read: {error}"], []
    everywhere = gathered(own)
    problems = union([problems for problems, _ in everywhere])
    notes = union([notes for _, notes in everywhere])
    # With the optimizer's file on one machine alone, only its rank would resume, and the others would restart.
    apart = [note for note in notes if note not in own[1]]
    return _Examined([*problems, *apart], notes)


def _problems(trainer: Trainer, tuners: Sequence[Tuner], checkpoint: Path) -> Iterator[str]:
    """Yield the reasons why ``checkpoint`` cannot be resumed exactly, as fragments that follow its path."""
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
    """Return the names of the Trainer's files that exact resuming needs; the Trainer itself does not require them."""
    scaler = [SCALER_NAME] if trainer.accelerator.scaler is not None else []
    states = [] if _has_other_processes(trainer, checkpoint) else [_random_state_of(trainer)]
    if runs_deepspeed(trainer):
        return [*zero_checkpoints.trainer_files(trainer), *states]
    return [OPTIMIZER_NAME, SCHEDULER_NAME, *states, *scaler]


def _random_state_of(trainer: Trainer) -> str:
    own = f"_{trainer.args.process_index}" if trainer.args.world_size > 1 else ""
    return f"rng_state{own}.pth"


def _has_other_processes(trainer: Trainer, checkpoint: Path) -> bool:
    """Whether the random states are from several ranks and this is one process, or the reverse."""
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
        elif method_record(tuner.method).needs_steps:
            yield (
                f"has no state.safetensors for adapter {tuner.name!r} (save_only_model?), and method "
                f"{tuner.method!r} cannot resume without it: load the adapter and start a new training run instead"
            )


def has_file(folder: Path, content: str) -> bool:
    """Whether a checkpoint's folder has an ``"adapter"`` or a training ``"state"``."""
    return file_at(folder, content).is_file()


def _problems_of_file(folder: Path, content: str) -> Iterator[str]:
    try:
        read(folder, content=content)
    except FileError as error:
        yield f"has a file that cannot be read: {error}"


def _is_state(path: Path) -> bool:
    """Whether a file is a valid `TrainerState`: required fields are present, and values have their types."""
    try:
        found = json.loads(path.read_bytes())
        state: Any = TrainerState(**found)  # Any: its values are unchecked
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
    """Whether a JSON value has a type in an annotation; int and float are interchangeable."""
    kinds = {typing.get_origin(each) or each for each in typing.get_args(hint) or (hint,)}
    return type(value) in kinds or (_is_number(value) and not kinds.isdisjoint((int, float)))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole_archive(path: Path) -> bool:
    """Whether a file of `torch.save` is undamaged: a zip archive with valid checksums, or the older format."""
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


def _is_between_generations(trainer: Trainer, checkpoint: Path) -> bool:
    """Whether one of TRL's trainers that generate would go on there with answers that it keeps in memory alone."""
    options: dict[str, Any] = vars(trainer.args)
    if options.get("steps_per_generation") is None:
        return False
    backwards = options["steps_per_generation"] * options.get("num_iterations", 1)
    step = checkpoint.name.rpartition("-")[2]
    return step.isdecimal() and int(step) * trainer.args.gradient_accumulation_steps % backwards != 0


def _notes(trainer: Trainer, checkpoint: Path) -> Iterator[str]:
    """Yield the reasons why resuming works, but the result will differ from an uninterrupted training's."""
    if _has_other_processes(trainer, checkpoint):
        yield (
            "was written by another number of processes: the random state restarts, so the result will differ from an "
            "uninterrupted training's"
        )
    if _is_between_generations(trainer, checkpoint):
        yield (
            "was written while answers were still in use (steps_per_generation, num_iterations): others are generated, "
            "so the result will differ from an uninterrupted training's"
        )
    if checkpoint.is_dir() and not runs_deepspeed(trainer) and not (checkpoint / OPTIMIZER_NAME).exists():
        yield (
            "has the weights alone (save_only_model): the optimizer, the learning rate's schedule and the random state "
            "restart, so the result will differ from an uninterrupted training's"
        )
