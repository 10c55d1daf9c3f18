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
from transformers import LlamaForCausalLM, Trainer

import tunerkit
from plugins.distributed.tests import trainer_runs, zero_training
from tests.support import two_processes

PROCESSES = 2
METHOD = "adalora 8 -> 2"
STAGES = (2, 3)
INIT = "3, in zero.Init"  # as from_pretrained builds the base while there are arguments for ZeRO-3
Run = int | str
RUNS: tuple[Run, ...] = (*STAGES, INIT)


def settings(run: Run) -> dict[str, Any]:
    """DeepSpeed's config, as the Trainer fills it."""
    stage = 3 if run == INIT else run
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        # By default ZeRO-3 leaves small parameters whole, and a tiny model has no others.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }


def trainer_of(run: Run, folder: Path) -> Any:
    """An attached trainer. ``use_cpu`` would turn DeepSpeed off; DS_ACCELERATOR has the same effect."""
    more = {"use_cpu": False, "ddp_backend": "gloo", "deepspeed": settings(run)}
    arguments = trainer_runs.arguments_of(folder, PROCESSES, **more)
    model = wrapped(LlamaForCausalLM.from_pretrained(base_at(folder))) if run == INIT else trainer_runs.build(METHOD)
    assert all((p.numel() == 0) == (run == INIT) for name, p in model.named_parameters() if ".tunerkit." not in name)
    trainer = Trainer(model, arguments, train_dataset=trainer_runs.Tokens())
    tunerkit.attach(model, trainer)
    return trainer


def base_at(folder: Path) -> Path:
    """Where the base lies, for trainings in ``folder``."""
    return folder.parent / "base"


def wrapped(base: Any) -> Any:
    """The base with a new adapter."""
    name, config = trainer_runs.METHODS[METHOD]
    return tunerkit.wrap(base, name, config, seed=3)


def train(run: Run, folder: Path, resume: bool | str = False) -> dict[str, Any]:
    """Train, and save at the end, as scripts do."""
    trainer = trainer_of(run, folder)
    model = trainer.model
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model(str(folder / "end"))
    with tunerkit.tuner(model).whole():
        found = trainer_runs.results(model)
    told = [str(each.message) for each in caught if issubclass(each.category, tunerkit.TunerkitWarning)]
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {**found, "losses": losses, "warnings": told}


def refused(run: Run, folder: Path, checkpoint: Path) -> str:
    """What is said to a training that is to resume from ``checkpoint``."""
    try:
        trainer_of(run, folder).train(resume_from_checkpoint=str(checkpoint))
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
        in_one(rank, lambda: trainer_runs.base().save_pretrained(Path(folder) / "base"))
        for number, each in enumerate(RUNS):
            place = Path(folder) / f"run{number}"
            found[each] = train(each, place)
            first = place / "checkpoint-3"
            found[each]["files"] = listed(first)
            own = next(first.glob("global_step3/*model_states.pt"))
            found[each]["module"] = sorted(torch.load(own, weights_only=False)["module"])
            for step in (6, 8):
                in_one(rank, functools.partial(shutil.rmtree, place / f"checkpoint-{step}"))
            found[each]["resumed"] = train(each, place, resume=True)
        bad = Path(folder) / "bad" / "checkpoint-3"
        in_one(rank, lambda: shutil.copytree(Path(folder) / "run0" / "checkpoint-3", bad))
        in_one(rank, lambda: next(bad.glob("global_step3/*rank_1_*optim_states.pt")).unlink())
        found["no part"] = refused(2, bad.parent, bad)
        in_one(rank, lambda: (bad / "latest").unlink())
        found["weights alone"] = refused(2, bad.parent, bad)
        torch.save(found, f"{folder}/{rank}.pt")
