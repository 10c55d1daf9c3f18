"""Trainings under ZeRO in several processes, each of which imports this by name, and what goes wrong there."""

import importlib
import itertools
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import torch
from torch import nn

import tunerkit
from plugins.distributed.tests import skipping
from tests.support import together, two_processes
from tests.support.collectives import Collectives
from tunerkit import injection, serialization, steps

PROCESSES = 2
_ACCUMULATED, _CLIP = 2, 0.1  # as in `tests.support.together`


@attrs.frozen
class ZeroJob:
    """One training, as `tests.support.together.Job`.

    Attributes:
        stage: 1, 2 or 3.
        method: The method's name.
        config: Its settings.
        steps: The length of training.
        stop: Train to this step, save all, build everything anew, load, and go on; 0 for no stop.
        options: More of DeepSpeed's settings.
        init: Whether the base is built in `deepspeed.zero.Init`, so that no process ever has all of it.
    """

    stage: int
    method: str
    config: Mapping[str, object]
    steps: int = 12
    stop: int = 0
    options: Mapping[str, Any] = attrs.field(factory=dict)
    init: bool = False


def settings(job: ZeroJob) -> dict[str, Any]:
    """DeepSpeed's config."""
    # By default ZeRO-3 leaves small parameters whole, and a tiny model has no others.
    zero = {"stage": job.stage, "stage3_param_persistence_threshold": 0}
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": _ACCUMULATED,
        "gradient_clipping": _CLIP,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        **job.options,
    }


def prepare(rank: int) -> Any:
    """Import DeepSpeed as a launcher would have it, without compiling its shared memory, and return it."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(rank))
    deepspeed: Any = importlib.import_module("deepspeed")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def base(deepspeed: Any, job: ZeroJob) -> nn.Module:
    """The base model, whole; or built in Init and filled there, as transformers does."""
    whole = together.net()
    if not job.init:
        return whole
    with deepspeed.zero.Init(config_dict_or_path=settings(job)):
        model = together.net()
    own = list(model.parameters())
    with deepspeed.zero.GatheredParameters(own, modifier_rank=0), torch.no_grad():
        for parameter, values in zip(own, whole.parameters(), strict=True):
            parameter.copy_(values)
    return model


def build(deepspeed: Any, job: ZeroJob, file: Path | None) -> tuple[nn.Module, Any]:
    """The wrapped model, and DeepSpeed's engine that trains it, attached."""
    if file is None:
        model = tunerkit.wrap(base(deepspeed, job), job.method, job.config, seed=1)
    else:
        model = tunerkit.load(base(deepspeed, job), file, trainable=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adam(model), config=settings(job))
    tunerkit.attach(model, engine, total_steps=job.steps)
    return model, engine


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of `tests.support.together`."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)


def take_steps(engine: Any, numbers: range, rank: int) -> None:
    """Train on this process's share of each batch."""
    dtype = next(p.dtype for p in engine.module.parameters())
    processes = torch.distributed.get_world_size()
    for step in numbers:
        x, classes = together.rows(step)
        for part in range(_ACCUMULATED):
            own = slice(part * processes + rank, None, processes * _ACCUMULATED)
            engine.backward(nn.functional.cross_entropy(engine(x[own].to(dtype)).float(), classes[own]))
            engine.step()


def train(deepspeed: Any, job: ZeroJob, folder: Path, rank: int) -> dict[str, Any]:
    """Train as ``job`` says; the results as `tests.support.together.train` returns them.

    Besides, ``shapes`` are those of the parameters between steps.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, engine = build(deepspeed, job, None)
        if job.stop:
            take_steps(engine, range(job.stop), rank)
            stopped = save(model, folder / "stopped")
            engine.save_checkpoint(folder / "deepspeed")
            model, engine = build(deepspeed, job, stopped.parent)
            engine.load_checkpoint(folder / "deepspeed")
            if injection.needs_steps(tunerkit.tuner(model)):
                tunerkit.load_state(model, stopped.parent)
        with Collectives() as stepping:
            take_steps(engine, range(job.stop, job.steps), rank)
        tuner = tunerkit.tuner(model)
        shapes = [tuple(parameter.shape) for parameter in tuner.parameters()]
        with Collectives() as saving:
            file = save(model, folder / "end")
    with tuner.whole():
        weights = {name: tensor.clone() for name, tensor in serialization.tensors_of(tuner).items()}
    engine.eval()
    with torch.no_grad():
        output = engine(together.inputs().to(next(p.dtype for p in model.parameters())))
    return {
        "ranks": tuner.ranks(),
        "history": [(change.step, change.budget, dict(change.ranks)) for change in tuner.history],
        "steps": tuner.steps,
        "weights": weights,
        "output": output.float(),
        "file": file,
        "shapes": shapes,
        "warnings": [str(each.message) for each in caught if issubclass(each.category, tunerkit.TunerkitWarning)],
        "merge": _merged(model, engine),
        "stepping": (dict(stepping.calls), dict(stepping.bytes)),
        "saving": (dict(saving.calls), dict(saving.bytes)),
    }


def save(model: nn.Module, folder: Path) -> Path:
    """Save the adapter, and its training state if it has one."""
    tuner = tunerkit.tuner(model)
    file = tunerkit.save(model, folder)
    if injection.needs_steps(tuner):
        tunerkit.save_state(model, folder)
    return file


def _merged(model: nn.Module, engine: Any) -> Any:
    """The output of the merged model, and whether unmerging restored it; or the error's text."""
    x = together.inputs().to(next(p.dtype for p in model.parameters()))
    with torch.no_grad():
        before = engine(x)
        try:
            tunerkit.merge(model)
        except tunerkit.TunerkitError as error:
            return str(error)
        merged = engine(x)
        tunerkit.unmerge(model)
        return merged.float(), bool(torch.equal(engine(x), before))


def go_wrong(deepspeed: Any, rank: int, folder: Path) -> dict[str, str]:
    """Do what must be refused in both processes; the message for each."""
    found = {}

    def note(name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except tunerkit.TunerkitError as error:
            found[name] = f"{type(error).__name__}: {error}"

    job = ZeroJob(2, "lora", {"rank": 2})
    apart = tunerkit.wrap(together.net(), "lora", {"rank": 2}, seed=rank)
    sharing, *_ = deepspeed.initialize(model=apart, optimizer=adam(apart), config=settings(job))
    note("seed", lambda: tunerkit.attach(apart, sharing, total_steps=4))
    assert "step" not in vars(sharing.optimizer)
    note("wrap", lambda: tunerkit.wrap(sharing, "lora", {"rank": 2}, adapter="second"))
    model = tunerkit.wrap(together.net(), "lora", {"rank": 2}, seed=1)
    without = {**settings(job), "zero_optimization": {"stage": 0}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=adam(model), config=without)
    note("stage 0", lambda: tunerkit.attach(model, engine, total_steps=4))
    return found


def leave(deepspeed: Any, rank: int, folder: Path) -> dict[str, Any]:
    """Attach and detach; DeepSpeed's step before, between and after, and whether the optimizer was freed."""
    model, engine = build(deepspeed, ZeroJob(2, "lora", {"rank": 2}), None)
    tuner = tunerkit.tuner(model)
    hooked = "step" in vars(engine.optimizer)
    steps.detach(tuner)
    restored = "step" not in vars(engine.optimizer)
    tunerkit.attach(model, engine, total_steps=4)
    optimizer = steps.optimizer_of(tuner)
    return {"hooked": hooked, "restored": restored, "again": optimizer is vars(engine.optimizer)["step"].__self__}


def part(deepspeed: Any, rank: int, folder: Path) -> dict[str, Any]:
    """Skip a backward in one process, or have one more there, at each stage; the error of this process by case.

    Besides, the barriers of two accumulated batches and a step, by stage.
    """
    found: dict[str, Any] = {}
    for stage in (1, 2, 3):
        ways = (skipping.skips_backward, skipping.has_one_more)
        for method, way in itertools.product(("lora", "adalora"), ways):
            job = ZeroJob(stage, method, {}, options={"gradient_accumulation_steps": 1})
            _, engine = build(deepspeed, job, None)
            found[f"{stage} {method} {way.__name__}"] = way(rank, engine, engine.step, engine.backward)
        _, engine = build(deepspeed, ZeroJob(stage, "lora", {}), None)
        with Collectives() as counted:
            take_steps(engine, range(1), rank)
        found[f"{stage} barriers"] = counted.sizes["allreduce_", 28]
    return found


def alone_unclipped(job: together.Job, folder: Path) -> dict[str, Any]:
    """Train in one process, without clipping."""
    with mock.patch.object(together, "clip_"):
        return together.train(job, folder)


Work = Callable[[Any, int, Path], Any]
NOTHING: Mapping[str, Work] = {}


def be_one(rank: int, jobs: Mapping[str, ZeroJob], folder: str, more: Mapping[str, Work], processes: int) -> None:
    """Be one of several processes that train together; the results are written to ``{folder}/{rank}.pt``."""
    with two_processes.joined(rank, folder, processes):
        deepspeed = prepare(rank)
        found: dict[str, Any] = {
            name: train(deepspeed, job, Path(folder) / name.replace(" ", "_"), rank) for name, job in jobs.items()
        }
        found |= {name: work(deepspeed, rank, Path(folder)) for name, work in more.items()}
        torch.save(found, f"{folder}/{rank}.pt")


def trained(
    jobs: Mapping[str, ZeroJob], folder: Path, more: Mapping[str, Work] = NOTHING, processes: int = PROCESSES
) -> list[dict[str, Any]]:
    """Train in several processes, one job after the other; the results of each process by job, and those of ``more``.

    Args:
        jobs: The trainings.
        folder: Where the processes meet and write.
        more: What each process does afterwards: functions of DeepSpeed, the number of the process, and the folder.
        processes: How many there are.
    """
    two_processes.spawn(be_one, (jobs, str(folder), more, processes), processes)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]
