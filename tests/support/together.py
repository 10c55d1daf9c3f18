"""One training in several processes, each of which imports this by name, and the same training in one."""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.distributed import fsdp

import tunerkit
from tests.support import two_processes
from tests.support.collectives import Collectives
from tunerkit import serialization

ENGINES = ("plain", "ddp", "fsdp2", "fsdp2 sharded")
_ROWS, _WIDTH, _CLASSES, _ACCUMULATED = 16, 12, 4, 2


@attrs.frozen
class Job:
    """One training."""

    engine: str  # "alone", or one of `ENGINES`
    method: str
    config: Mapping[str, object]
    steps: int = 12
    stop: int = 0  # the step after which everything is saved, built anew and loaded
    no_sync: bool = False  # whether averages wait for the last of the accumulated batches

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base and of its inputs: that of the adapter."""
        found: torch.dtype = getattr(torch, str(self.config.get("adapter_dtype", "float32")))
        return found


def net() -> nn.Sequential:
    """Build a small classifier with the same weights at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(_WIDTH, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, _CLASSES)]
    return nn.Sequential(*layers)


def rows(step: int) -> tuple[Tensor, Tensor]:
    """The global batch of one step: inputs and classes."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(_ROWS, _WIDTH, generator=generator), torch.randint(0, _CLASSES, (_ROWS,), generator=generator)


def inputs() -> Tensor:
    """What models are compared on."""
    return torch.randn(5, _WIDTH, generator=torch.Generator().manual_seed(99))


def train(job: Job, folder: Path, rank: int = 0, processes: int = 1) -> dict[str, Any]:
    """Train as ``job`` says, on this process's share of each batch; collectives are returned as (calls, bytes)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        share = rank, processes
        model, parallel, optimizer = built(job, None)
        if job.stop:
            take_steps(parallel, optimizer, range(job.stop), share, job.no_sync)
            stopped = tunerkit.save(model, folder / "stopped")
            state = copy.deepcopy(optimizer.state_dict())
            model, parallel, optimizer = built(job, stopped)
            optimizer.load_state_dict(state)
        with Collectives() as stepping:
            take_steps(parallel, optimizer, range(job.stop, job.steps), share, job.no_sync)
        with Collectives() as saving:
            file = tunerkit.save(model, folder / "end")
    with torch.no_grad():
        output = parallel(inputs().to(job.dtype))
    return {
        **trained(model),
        "output": output,
        "file": file,
        "warnings": [str(each.message) for each in caught if issubclass(each.category, tunerkit.TunerkitWarning)],
        "merge": _merged(model),
        "stepping": (dict(stepping.calls), dict(stepping.bytes)),
        "saving": (dict(saving.calls), dict(saving.bytes)),
    }


def trained(model: nn.Module) -> dict[str, Any]:
    """What trainings are compared by: ``ranks``, ``history``, and ``weights``, whole, by name."""
    tuner = tunerkit.tuner(model)
    with tuner.whole():
        weights = {name: tensor.clone() for name, tensor in serialization.tensors_of(tuner).items()}
    history = [(change.step, change.budget, dict(change.ranks)) for change in tuner.history]
    return {"ranks": tuner.ranks(), "history": history, "weights": weights}


def built(job: Job, file: Path | None) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    """Build the model, new or loaded from ``file``, the one that runs, and the attached optimizer."""
    if file is None:
        model: nn.Module = tunerkit.wrap(net().to(job.dtype), job.method, job.config, seed=1)
    else:
        model = tunerkit.load(net().to(job.dtype), file, trainable=True)
    parallel = model
    match job.engine:
        case "ddp":
            parallel = nn.parallel.DistributedDataParallel(model)
        case "fsdp2":
            _shard_(model, set(tunerkit.tuner(model).parameters()))
        case "fsdp2 sharded":
            _shard_(model, set())
    optimizer = adam(model)
    tunerkit.attach(model, optimizer, total_steps=job.steps)
    return model, parallel, optimizer


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of all that is trained."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)


def _shard_(model: nn.Module, ignored: set[nn.Parameter]) -> None:
    """Shard each layer, then the rest, as users of FSDP2 do."""
    for layer in model.children():
        if isinstance(layer, nn.Linear):
            fsdp.fully_shard(layer, ignored_params=ignored)
    fsdp.fully_shard(model, ignored_params=ignored)


def take_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, share: tuple[int, int], no_sync: bool
) -> None:
    """Train for ``steps``, with accumulation and clipping, on a share (process, processes) of each batch."""
    rank, processes = share
    dtype = next(model.parameters()).dtype
    for step in steps:
        x, classes = rows(step)
        optimizer.zero_grad()
        for part in range(_ACCUMULATED):
            own = slice(part * processes + rank, None, processes * _ACCUMULATED)
            with tunerkit.no_sync(model) if no_sync and part + 1 < _ACCUMULATED else nullcontext():
                (nn.functional.cross_entropy(model(x[own].to(dtype)), classes[own]) / _ACCUMULATED).backward()
        clip_(model, 0.1)
        optimizer.step()


def clip_(model: nn.Module, most: float, clip: Callable[..., object] = nn.utils.clip_grad_norm_) -> None:
    """Scale the gradients down to a norm of ``most``, by ``clip`` where it does for shards what it does for whole ones.

    That of torch 2.9.1 adds its 1e-6 to each shard's part of the norm (pytorch/pytorch#149768); 2.13 does not.
    """
    if torch.__version__ >= "2.13":
        clip(model.parameters(), most)
        return
    norm: Any = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    nn.utils.clip_grads_with_norm_(model.parameters(), most, whole)


def _merged(model: nn.Module) -> Any:
    """The output of the merged model, and whether unmerging restored it; or the error's text."""
    with torch.no_grad():
        x = inputs().to(next(model.parameters()).dtype)
        before = model(x)
        try:
            merged = tunerkit.merge(model)(x)
        except tunerkit.TunerkitError as error:
            return str(error)
        return merged, bool(torch.equal(tunerkit.unmerge(model)(x), before))


def be_one(
    rank: int,
    jobs: Sequence[Job],
    folder: str,
    processes: int,
    plugins: Sequence[Callable[[], object]],
    run: Callable[[Job, Path, int, int], Any],
) -> None:
    """Be one of several processes that train together; the results are written to ``{folder}/{rank}.pt``."""
    with two_processes.joined(rank, folder, processes):
        for plugin in plugins:
            tunerkit.register(plugin())
        results = [run(job, Path(folder) / str(number), rank, processes) for number, job in enumerate(jobs)]
        torch.save(results, f"{folder}/{rank}.pt")


def together(
    jobs: Sequence[Job],
    folder: Path,
    processes: int = 2,
    plugins: Sequence[Callable[[], object]] = (),
    run: Callable[[Job, Path, int, int], Any] = train,
) -> list[list[dict[str, Any]]]:
    """Train in several processes, one job after the other, in a folder of the job: the results of each, by process."""
    folder.mkdir(parents=True, exist_ok=True)
    two_processes.spawn(be_one, (jobs, str(folder), processes, plugins, run), processes)
    found = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]
    return [list(results) for results in zip(*found, strict=True)]
