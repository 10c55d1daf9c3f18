"""Trainings with a Trainer under DeepSpeed's ZeRO, in processes that import this by name."""

import functools
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import accelerate  # type: ignore[import-untyped]
import torch
from torch import distributed

import tunerkit
from tests.parallel import trainer_runs, zero_training
from tunerkit.testing import two_processes

PROCESSES = 2
METHOD = "adalora 8 -> 2"
STAGES = (2, 3)


def settings(stage: int) -> dict[str, Any]:
    """DeepSpeed's config, as the Trainer fills it."""
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        # By default ZeRO-3 leaves small parameters whole, and a tiny model has no others.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }


def trainer_of(model: Any, folder: Path, stage: int, **options: Any) -> Any:
    """An attached trainer. ``use_cpu`` would turn DeepSpeed off; DS_ACCELERATOR has the same effect."""
    more = {"use_cpu": False, "ddp_backend": "gloo", "deepspeed": settings(stage), **options}
    trainer = trainer_runs.trainer_of(model, folder, PROCESSES, **more)
    tunerkit.attach(model, trainer)
    return trainer


def train(stage: int, folder: Path, resume: bool | str = False) -> dict[str, Any]:
    """Train, and save at the end, as scripts do."""
    model = trainer_runs.build(METHOD)
    trainer = trainer_of(model, folder, stage)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model(str(folder / "end"))
    with tunerkit.tuner(model).whole():
        found = trainer_runs.results(model)
    told = [str(each.message) for each in caught if issubclass(each.category, tunerkit.TunerkitWarning)]
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {**found, "losses": losses, "warnings": told}


def refused(stage: int, folder: Path, checkpoint: Path) -> str:
    """What is said to a training that is to resume from ``checkpoint``."""
    model = trainer_runs.build(METHOD)
    try:
        trainer_of(model, folder, stage).train(resume_from_checkpoint=str(checkpoint))
    except tunerkit.TunerkitError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def listed(folder: Path) -> list[str]:
    """The files below ``folder``."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def in_one(rank: int, work: Any) -> None:
    """Let process 0 change files while the others wait."""
    distributed.barrier()
    if rank == 0:
        work()
    distributed.barrier()


def run(rank: int, folder: str) -> None:
    """Be one of two processes that train under ZeRO-2 and ZeRO-3, and resume in the middle."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(PROCESSES), "LOCAL_WORLD_SIZE": str(PROCESSES)}
    plain = accelerate.PartialState.__init__

    def init(self: Any, cpu: bool = False, **kwargs: Any) -> None:
        plain(self, cpu, **{**kwargs, "backend": "gloo"})  # on CPUs it takes one process for all

    accelerate.PartialState.__init__ = init
    with two_processes.joined(rank, folder):
        zero_training.prepare(rank)
        found: dict[Any, Any] = {}
        for stage in STAGES:
            place = Path(folder) / f"zero{stage}"
            found[stage] = train(stage, place)
            first = place / "checkpoint-3"
            found[stage]["files"] = listed(first)
            own = next(first.glob("global_step3/*model_states.pt"))
            found[stage]["module"] = sorted(torch.load(own, weights_only=False)["module"])
            for step in (6, 8):
                in_one(rank, functools.partial(shutil.rmtree, place / f"checkpoint-{step}"))
            found[stage]["resumed"] = train(stage, place, resume=True)
        bad = Path(folder) / "bad" / "checkpoint-3"
        in_one(rank, lambda: shutil.copytree(Path(folder) / "zero2" / "checkpoint-3", bad))
        in_one(rank, lambda: next(bad.glob("global_step3/*rank_1_*optim_states.pt")).unlink())
        found["no part"] = refused(2, bad.parent, bad)
        in_one(rank, lambda: (bad / "latest").unlink())
        found["weights alone"] = refused(2, bad.parent, bad)
        torch.save(found, f"{folder}/{rank}.pt")
