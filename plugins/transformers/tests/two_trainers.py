"""Trains in two processes that see different files, and resumes; each imports this function by name."""

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers import Trainer

import tunerkit
from tests.support import two_processes
from tests.support.trainer_toys import attached_trainer
from tunerkit_testing.toy_methods import ShiftPlugin
from tunerkit_transformers.resuming import choose_checkpoint


def resume_together(rank: int, folder: str) -> None:
    """Be one of two processes that train, lose a file, and choose the checkpoint to resume from.

    The results are written to ``{folder}/{rank}.pt``: under ``"answers"``, for each case, the name of the chosen
    checkpoint or the error, and the warnings; and the weights at the end of an uninterrupted training and, if both
    processes chose alike, of a resumed one.

    Args:
        rank: which of the two processes this is; `two_processes.spawn` gives it.
        folder: where the processes meet and write.
    """
    # How accelerate learns of the processes; the group itself is made below.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    with two_processes.joined(rank, folder):
        tunerkit.register(ShiftPlugin())
        run, elsewhere, part = (Path(folder) / name for name in ("run", "elsewhere", "part"))
        trainer = attached_trainer(run)
        trainer.train()
        end = _weights(trainer)
        _on_first(rank, lambda: shutil.rmtree(run / "checkpoint-6"))
        _on_first(rank, lambda: shutil.copytree(run / "checkpoint-2", elsewhere / "checkpoint-2"))
        no_trainer = shutil.ignore_patterns("optimizer.pt", "scheduler.pt", "rng_state*")
        _on_first(rank, lambda: shutil.copytree(run / "checkpoint-4", part / "checkpoint-4", ignore=no_trainer))
        newest, state = run / "checkpoint-4", run / "checkpoint-4" / "rng_state_1.pth"
        trainer = attached_trainer(run)
        answers = {"whole": _answer(trainer, True), "named": _answer(trainer, str(newest))}
        answers["asked for by one"] = _answer(trainer, [str(newest), None][rank])
        answers["none"] = _answer(trainer, None)
        trainer.args.output_dir = str([run, elsewhere][rank])
        answers["folder of one process"] = _answer(trainer, True)
        answers["optimizer of one process"] = _answer(trainer, str([run, part][rank] / "checkpoint-4"))
        trainer.args.output_dir = str(run)
        _on_first(rank, lambda: state.write_bytes(state.read_bytes()[: state.stat().st_size // 2]))
        answers["own state damaged"] = _answer(trainer, True)
        answers["damaged and named"] = _answer(trainer, str(newest))
        resumed = _resumed(trainer) if _agree(answers["own state damaged"][0]) else []
        torch.save({"answers": answers, "end": end, "resumed": resumed}, f"{folder}/{rank}.pt")


def _on_first(rank: int, change: Callable[[], object]) -> None:
    """Change files in one process, while the other one waits."""
    distributed.barrier()
    if rank == 0:
        change()
    distributed.barrier()


def _answer(trainer: Trainer, wanted: Any) -> tuple[str | None, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            chosen = choose_checkpoint(trainer, list(tunerkit.adapters(_model(trainer)).values()), wanted)
            answer = None if chosen is None else Path(chosen).name
        except tunerkit.TunerkitError as error:
            answer = f"{type(error).__name__}: {error}"
    return answer, [str(warning.message) for warning in caught]


def _agree(answer: str | None) -> bool:
    answers: list[str | None] = [None, None]
    distributed.all_gather_object(answers, answer)
    return answers[0] == answers[1]


def _resumed(trainer: Trainer) -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tunerkit.TunerkitWarning)
        trainer.train(resume_from_checkpoint=True)
    return _weights(trainer)


def _weights(trainer: Trainer) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in _model(trainer).parameters()]


def _model(trainer: Trainer) -> nn.Module:
    assert isinstance(trainer.model, nn.Module)
    return trainer.model
