"""DistributedDataParallel whose adapters change shape, in processes that import this by name."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

import tunerkit
from tests.support import together, two_processes
from tests.support.toy_growing import GrowingPlugin
from tunerkit.plugin import Cut, resize_obstacle, shrink_

# Layer 4 is trained in full: a parameter that keeps its shape, beside those that change.
CONFIG = {"targets": ["0", "2"], "train_modules": ["4"], "every": 1000}


class Skipping(nn.Module):
    """Runs a model without its second layer, whose adapter then has no gradient."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        for name in ("0", "1", "4"):
            x = self.inner.get_submodule(name)(x)
        return x


Wrapper = Callable[..., nn.Module]
WAYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "views of buckets": {"gradient_as_bucket_view": True},
    "small buckets": {"bucket_cap_mb": 1e-4},
    "unused parameters": {"find_unused_parameters": True},
    "static graph": {"static_graph": True, "gradient_as_bucket_view": True},
    "hook": {},
    "compiled inside": {},
    "compiled around": {},
}


PHASES = {
    "start": [1, 1],
    "grow": [2, 2],
    "grow again": [3, 3],
    "shrink": [2, 2],
    "load": [1, 1],
    "frozen": [2, 2],
    "empty": [0, 2],
    "load again": [1, 1],
}  # what happens to the shapes, and the ranks then


def attached(adapter: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """SGD, which has no state that a load could leave behind."""
    optimizer = torch.optim.SGD([p for p in adapter.parameters() if p.requires_grad], lr=0.05)
    tunerkit.attach(adapter, optimizer, total_steps=100, **options)
    return optimizer


def wrapped() -> nn.Module:
    model: nn.Module = tunerkit.wrap(together.net(), "toy-growing", CONFIG, seed=1)
    return model


def built(way: str) -> tuple[nn.Module, nn.Module, nn.Module, DistributedDataParallel]:
    """The wrapped model, that which computes the same without DDP, that which runs, and DDP."""
    model = wrapped()
    plain = Skipping(model) if way == "unused parameters" else model
    inner: Any = torch.compile(plain, backend="aot_eager") if way == "compiled inside" else plain
    parallel = DistributedDataParallel(inner, **WAYS[way])
    if way == "hook":
        parallel.register_comm_hook(None, default_hooks.fp16_compress_hook)
    runs: Any = torch.compile(parallel, backend="aot_eager") if way == "compiled around" else parallel
    return model, plain, runs, parallel


def resize(model: nn.Module, optimizer: torch.optim.Optimizer, way: str) -> Any:
    """Add a row to each adapter, remove the first one, or empty the first adapter."""
    adapters: list[Any] = list(tunerkit.tuner(model).adapters().values())
    if way == "grow":
        generator = torch.Generator().manual_seed(7)
        return tunerkit.grow_([one for adapter in adapters for one in adapter.growths(generator)], optimizer)
    if way == "empty":
        return shrink_(cuts(adapters[0], torch.arange(0)), optimizer)
    return shrink_([cut for a in adapters for cut in cuts(a, torch.arange(1, a.rank))], optimizer)


def cuts(adapter: Any, kept: Tensor) -> list[Cut]:
    return [Cut(adapter.a, 0, kept), Cut(adapter.b, 1, kept)]


def batches(step: int, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The two batches that a process accumulates in a step."""
    x, classes = together.rows(step)
    for part in range(2):
        yield x[2 * part + rank :: 4], classes[2 * part + rank :: 4]


def loss(model: nn.Module, x: Tensor, classes: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), classes)


def averages(model: nn.Module, trained: list[nn.Parameter], step: int, rank: int) -> list[Tensor]:
    """What the gradients of a step must be: computed without DDP, and averaged by hand."""
    total = torch.stack([loss(model, *batch) for batch in batches(step, rank)]).sum()
    grads = torch.autograd.grad(total, trained, materialize_grads=True)
    for grad in grads:
        distributed.all_reduce(grad)
    return [grad / 2 for grad in grads]


def differences(way: str, rank: int) -> dict[str, Any]:
    """Train under DDP through changes of shapes.

    Returns:
        By phase, the largest difference of a gradient from what it must be, over the largest gradient (``grads``), the
        bytes of DDP's buckets (``buckets``), and the ranks.
    """
    model, plain, runs, parallel = built(way)
    optimizer = attached(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reducers, found, step = [], {}, 0
    for phase in PHASES:
        reducers.append(parallel.reducer)  # a reducer that somebody still holds must not average either
        runs(together.inputs())  # a forward without a backward leaves it waiting for one
        if phase.startswith("load"):
            model.load_state_dict(first)
        elif phase == "frozen":
            trained[0].requires_grad_(False)
            resize(model, optimizer, "grow")
            trained[0].requires_grad_(True)
        elif phase != "start":
            resize(model, optimizer, phase.split()[0])
        worst = 0.0
        for _ in range(2):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            expected = averages(plain, trained, step, rank)
            for part, batch in enumerate(batches(step, rank)):
                # DDP with a static graph counts the uses of a parameter, also without synchronisation.
                with parallel.no_sync() if part == 0 and way != "static graph" else nullcontext():
                    loss(runs, *batch).backward()
            worst, step = max(worst, gap(trained, expected)), step + 1
            optimizer.step()
        logged = parallel._get_ddp_logging_data()
        found[phase] = {
            "grads": worst,
            "buckets": sum(map(int, logged["bucket_sizes"].split(","))),
            "values": sum(parameter.numel() for parameter in trained),
            "ranks": list(tunerkit.tuner(model).ranks().values()),
        }
    return found


def gap(trained: list[nn.Parameter], expected: list[Tensor]) -> float:
    """The largest difference of a gradient from what it must be, over the largest gradient."""
    whole = torch.cat([each.flatten() for each in expected])
    grads = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained])
    return float((grads - whole).abs().max() / whole.abs().max())


def apart() -> str | None:
    """Why shapes stay where each process trains for itself, and DDP is around all the same."""
    model = wrapped()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    parallel = DistributedDataParallel(model)
    try:
        tunerkit.attach(model, optimizer, total_steps=100, data_parallel=False)
        reason = resize_obstacle(tunerkit.tuner(model).parameters(), optimizer)
    except tunerkit.errors.StepError as error:  # toy-growing refuses to start where it cannot grow
        reason = str(error)
    return f"{reason} {parallel.static_graph}"


def gone(rank: int) -> str | None:
    """Why shapes stay when DDP was there in the first backward, and is not any more; no step is taken then."""
    model = wrapped()
    parallel = DistributedDataParallel(model)
    optimizer = attached(model)
    loss(parallel, *next(batches(0, rank))).backward()
    del parallel
    return resize_obstacle(tunerkit.tuner(model).parameters(), optimizer)


def loaded_unseen(rank: int) -> str:
    """DDP is built after attach, which so does not see it, and an adapter of another rank is loaded before training."""
    model, other = wrapped(), wrapped()
    optimizer = attached(model)
    resize(other, attached(other), "grow")
    parallel = DistributedDataParallel(model)
    model.load_state_dict(other.state_dict())
    try:
        loss(parallel, *next(batches(0, rank))).backward()
        optimizer.step()
    except tunerkit.errors.StepError as error:
        return str(error)
    return ""


def run_all(rank: int, folder: str, ways: list[str]) -> None:
    """Be one of two processes that do all of this; the results are written to ``{folder}/{rank}.pt``."""
    with two_processes.joined(rank, folder):
        tunerkit.register(GrowingPlugin())
        found: dict[str, Any] = {way: differences(way, rank) for way in ways}
        found |= {"apart": apart(), "gone": gone(rank), "loaded unseen": loaded_unseen(rank)}
        torch.save(found, Path(folder) / f"{rank}.pt")
