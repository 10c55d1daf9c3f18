"""A training that stops, and goes on in other processes, perhaps another number of them: all through one checkpoint.

The adapter and the training state are in tunerkit's files. The optimizer's state is in torch's distributed checkpoint,
which sets it up anew for any number of processes.
"""

import os
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint import state_dict, state_dict_loader, state_dict_saver
from torch.optim import Optimizer

import tunerkit
from tests.support.together import Job, adam, built, net, take_steps, trained


def begin(job: Job, folder: Path, rank: int = 0, processes: int = 1) -> None:
    """Train as ``job`` says to its stop, and write a checkpoint."""
    model, parallel, optimizer = built(job, None)
    take_steps(parallel, optimizer, range(job.stop), (rank, processes), job.no_sync)
    tunerkit.save(model, folder)
    tunerkit.save_state(model, folder)
    state_dict_saver.save(_optimizer_state(parallel, optimizer), checkpoint_id=folder / "optimizer")


def go_on(job: Job, folder: Path, rank: int = 0, processes: int = 1) -> dict[str, Any]:
    """Train from the checkpoint of `begin` to the end. Returns what `trained` does, and the ``steps`` before that."""
    model, parallel, optimizer = built(job, folder)
    state = _optimizer_state(parallel, optimizer)
    steps = tunerkit.tuner(model).steps
    tunerkit.load_state(model, folder)
    state_dict_loader.load(state, checkpoint_id=folder / "optimizer")
    state_dict.set_optimizer_state_dict(parallel, optimizer, state["optimizer"])
    take_steps(parallel, optimizer, range(job.stop, job.steps), (rank, processes), job.no_sync)
    return {**trained(model), "steps": steps}


def hand_over(job: Job, folder: Path, rank: int, processes: int) -> dict[str, Any]:
    """Write a checkpoint to ``here``, and go on from it, and from another one that is in ``before``.

    With accelerate there is only ``here``, and ``adapters alone`` for a checkpoint without the base.
    """
    if job.engine == "accelerate":
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        ways = {"here": False, "adapters alone": True}
        return {name: _through_accelerate(job, folder / name, rank, processes, alone) for name, alone in ways.items()}
    begin(job, folder / "here", rank, processes)
    return {name: go_on(job, folder / name, rank, processes) for name in ("here", "before")}


def _through_accelerate(job: Job, folder: Path, rank: int, processes: int, alone: bool) -> dict[str, Any]:
    """Train under DDP, as accelerate sets it up, and go on from what its ``save_state`` wrote, or the like of it."""
    from accelerate import Accelerator  # an optional dependency

    from tunerkit_distributed.accelerate import checkpoint_adapters_

    part = range(job.stop)
    for again in (False, True):
        accelerator = Accelerator(cpu=True)
        model: nn.Module = tunerkit.wrap(net().to(job.dtype), job.method, job.config, seed=1)
        parallel, optimizer = accelerator.prepare(model, adam(model))
        tunerkit.attach(model, optimizer, total_steps=job.steps)
        if alone:
            checkpoint_adapters_(accelerator)
        steps = tunerkit.tuner(model).steps
        if again:
            accelerator.load_state(str(folder))
            part = range(job.stop, job.steps)
        take_steps(parallel, optimizer, part, (rank, processes), job.no_sync)
        if not again:
            accelerator.save_state(str(folder))
            accelerator.wait_for_everyone()
    return {**trained(model), "steps": steps}


def _optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    return {"optimizer": state_dict.get_optimizer_state_dict(model, optimizer)}
