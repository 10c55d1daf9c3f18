"""Trainings of one process and of several under FSDP2, which processes of a group import by name."""

import time
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import distributed, nn
from torch.distributed import fsdp

import tunerkit
from tests.support import together, two_processes
from tests.support.collectives import Collectives
from tests.support.toy_starts import PrincipalPlugin
from tunerkit import injection
from tunerkit_distributed.sharded import Sharded

STEPS, ACCUMULATED, PER_PROCESS = 12, 2, 2
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"rank": 3}),
    "adalora 8 -> 2": ("adalora", {"init_rank": 8, "target_rank": 2, "delta_t": 2}),
    "adalora 6 -> 4": (
        "adalora",
        {"init_rank": 6, "target_rank": 4, "delta_t": 3, "exact_svd": False, "gamma": 0.1},
    ),
}


def build(method: str, seed: int | None = 3, **more: Any) -> nn.Module:
    """A wrapped network, in float64, whose shapes no number of processes divides evenly."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    name, settings = METHODS[method]
    config = {"targets": "all-linear", "adapter_dtype": "float64", **settings, **more}
    return tunerkit.wrap(net, name, config, seed=seed)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """Adam with an eps above the rounding of gradients that are 0 but for it, which it would scale up to steps."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, eps=1e-6)


def shard_(model: nn.Module, **options: Any) -> None:
    for layer in model:  # type: ignore[attr-defined]  # a Sequential
        if isinstance(layer, nn.Linear):
            fsdp.fully_shard(layer, **options)
    fsdp.fully_shard(model, **options)


def batches(processes: int, rank: int, of: int) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """The micro-batches of each step: ``rank``'s share of a global batch of ``processes`` shares, read by ``of``."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        step = []
        for _ in range(ACCUMULATED):
            x = torch.randn(processes * PER_PROCESS, 6, generator=generator).double()
            y = torch.randint(0, 3, (len(x),), generator=generator)
            step.append((x[rank::of], y[rank::of]))
        yield step


def train(model: nn.Module, optimizer: torch.optim.Optimizer, processes: int, rank: int, of: int) -> None:
    """Take all steps, with accumulation and clipping."""
    for step in batches(processes, rank, of):
        optimizer.zero_grad()
        for x, y in step:
            (nn.functional.cross_entropy(model(x), y) / len(step)).backward()
        together.clip_(model, 0.5)
        optimizer.step()


@torch.no_grad()
def results(model: nn.Module) -> dict[str, Any]:
    """What two trainings are compared by; inside `Sharded.whole`, or of a model that is whole."""
    tuner = tunerkit.tuner(model)
    masks = [getattr(adapter, "mask", None) for adapter in tuner.adapters().values()]
    return {
        "weights": {name: parameter.detach().clone() for name, parameter in tuner.named_parameters()},
        "masks": [mask for mask in masks if mask is not None],
        "history": [(change.step, change.budget, change.ranks) for change in tuner.history],
    }


def are_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Whether weights in float64 differ by no more than other orders of sums lead to."""
    return found.keys() == expected.keys() and all(
        torch.allclose(weight, expected[name], rtol=0, atol=1e-12) for name, weight in found.items()
    )


def alone(method: str, processes: int) -> dict[str, Any]:
    """The training of one process on the same global batches."""
    model = build(method, **({"shrink": False} if "adalora" in method else {}))  # shards stay as they are too
    optimizer = adam(model)
    tunerkit.attach(model, optimizer, total_steps=STEPS)
    train(model, optimizer, processes, 0, 1)
    return results(model)


def train_sharded(rank: int, processes: int, folder: str) -> None:
    """Be one of several processes that train with sharded adapters; the results are written by method."""
    with two_processes.joined(rank, folder, processes):
        found = {}
        for method in METHODS:
            model = build(method)
            shard_(model)
            optimizer = adam(model)
            tunerkit.attach(model, optimizer, total_steps=STEPS)
            train(model, optimizer, processes, rank, processes)
            with tunerkit.tuner(model).whole():
                found[method] = results(model)
        torch.save(found, f"{folder}/{rank}.pt")


class Odd(nn.Module):
    """Parameters that several processes cannot share evenly: 5 rows, 1 row, none, one number; and one of bf16."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.five = nn.Parameter(torch.randn(5, 3))
        self.one = nn.Parameter(torch.randn(1, 4))
        self.none = nn.Parameter(torch.randn(0, 4))
        self.number = nn.Parameter(torch.randn(1))
        self.coarse = nn.Parameter(torch.randn(3, 2).bfloat16(), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(4))
        self.tied = nn.Linear(2, 3)
        self.again = nn.Module()
        self.again.weight = self.tied.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.one.sum() * self.number + self.coarse.float().sum()
        return self.tied((x @ self.five.T)[:, :2]) * y


class Around(nn.Module):
    """A root that FSDP2 leaves whole after a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.odd = Odd()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.odd(x)


def odd_and_twin(**options: Any) -> tuple[Any, Any]:
    """A sharded model after a forward and a backward, and the same in one process."""
    found = []
    for sharded in (True, False):
        model = Around()
        if sharded:
            fsdp.fully_shard(model, **options)
        model(torch.ones(2, 3)).sum().backward()
        found.append(model)
    return found[0], found[1]


def look_inside(folder: str) -> dict[str, Any]:
    """Try what a block of whole parameters promises; one process's answers by name."""
    answers = {name: check() for name, check in CHECKS.items()}
    answers["saved"] = _saves_quietly(folder)
    answers["saved again"] = _saves_again(folder)
    answers["patient"] = _waits_for_a_busy_writer(folder)
    return answers


def _same(model: Any, twin: Any, *, grads: bool = True) -> bool:
    pairs = list(zip(model.parameters(), twin.parameters(), strict=True))
    values = all(type(p) is nn.Parameter and torch.equal(p, q) and p.requires_grad == q.requires_grad for p, q in pairs)
    same = values and all(
        (p.grad is None) == (q.grad is None) and (p.grad is None or torch.allclose(p.grad, q.grad)) for p, q in pairs
    )
    return same if grads else values and all(p.grad is None for p, _ in pairs)


def _is_whole_inside() -> bool:
    model, twin = odd_and_twin()
    names = list(dict(model.odd.named_parameters()))
    with Sharded(model).whole([model.odd], gradients=True):
        return _same(model, twin) and list(dict(model.odd.named_parameters())) == names


def _is_put_back() -> bool:
    model, _ = odd_and_twin()
    before = {name: (p, p.to_local().clone(), p.grad) for name, p in model.named_parameters()}
    with Sharded(model).whole([model.odd], gradients=True):
        pass
    after = dict(model.named_parameters())
    return all(
        after[name] is p and torch.equal(p.to_local(), value) and p.grad is grad
        for name, (p, value, grad) in before.items()
    )


def _keeps_changes(error: bool = False) -> bool:
    model, twin = odd_and_twin()
    engine = Sharded(model)
    try:
        with engine.whole([model.odd], gradients=True):
            for each in (model, twin):
                with torch.no_grad():
                    for parameter in each.parameters():
                        parameter.mul_(2)
                        if parameter.grad is not None:
                            parameter.grad.add_(1)
                each.odd.one.grad = None
                each.odd.unused.grad = torch.ones(4)
            if error:
                raise KeyError
    except KeyError:
        pass
    with engine.whole([model.odd], gradients=True):
        return _same(model, twin)


def _withholds() -> bool:
    """A gradient that is taken away inside the block stays away, with what the block has added to it."""
    model, _ = odd_and_twin()
    with torch.no_grad(), Sharded(model).whole([model.odd], gradients=True) as outside:
        model.odd.five.grad.fill_(3)
        parameter: Any = outside(model.odd.five)
        held, parameter.grad = parameter.grad, None
    return model.odd.five is parameter and model.odd.five.grad is None and bool((held.to_local() == 3).all())


def _shards_the_root_again() -> bool:
    """After a forward without a backward, FSDP2 leaves the parameters of its root whole."""
    model, twin = odd_and_twin()
    with torch.no_grad():
        model(torch.ones(2, 3))
    was_whole = type(model.odd.five) is nn.Parameter
    with Sharded(model).whole([model.odd], gradients=False):
        inside = _same(model, twin, grads=False)
    return was_whole and inside and hasattr(model.odd.five, "to_local")


def _nests() -> bool:
    model, twin = odd_and_twin()
    engine = Sharded(model)
    with engine.whole([model.odd], gradients=True):
        with engine.whole([model.odd], gradients=False):
            inner = _same(model, twin)
        return inner and _same(model, twin)


def _reads_other_dimensions() -> bool:
    """Cut along the second dimension where that is even, and replicated in a second dimension of the mesh."""
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1, distributed.get_world_size()), mesh_dim_names=("r", "s"))

    def placement(parameter: nn.Parameter) -> Any:
        from torch.distributed.tensor import Shard

        return (
            Shard(1)
            if parameter.ndim > 1 and len(parameter) and parameter.shape[1] % distributed.get_world_size() == 0
            else None
        )

    model, twin = odd_and_twin(mesh=mesh, shard_placement_fn=placement)
    with Sharded(model).whole([model.odd], gradients=True):
        return _same(model, twin)


def _error(call: Any) -> str:
    try:
        call()
    except tunerkit.TunerkitError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _mixed() -> str:
    model = build("lora")
    tuner = tunerkit.tuner(model)
    fsdp.fully_shard(model, ignored_params={next(iter(tuner.parameters()))})
    return _error(lambda: tunerkit.attach(model, adam(model)))


def _resized() -> str:
    model, _ = odd_and_twin()

    def shrink() -> None:
        with Sharded(model).whole([model.odd], gradients=False):
            model.odd.five.data = model.odd.five.data[:2]

    found = _error(shrink)
    return found if hasattr(model.odd.five, "to_local") else "not put back"


def _other_seeds() -> str:
    model = build("lora", seed=distributed.get_rank())
    shard_(model)
    return _error(lambda: tunerkit.attach(model, adam(model)))


def _no_seed() -> str:
    model = build("lora", seed=None)
    shard_(model)
    return _error(lambda: tunerkit.attach(model, adam(model)))


def _other_starts(seed: int | None) -> str:
    """A method that subtracts its random start from the base."""
    tunerkit.register(PrincipalPlugin())
    model = tunerkit.wrap(nn.Sequential(nn.Linear(6, 9)), "toy-principal", {"targets": "all-linear"}, seed=seed)
    fsdp.fully_shard(model)
    return _error(lambda: tunerkit.attach(model, adam(model)))


def _collectives() -> dict[str, Any]:
    """What the steps of each method exchange beside FSDP2's own, as docs/evidence/scaling-grids.md says."""
    found = {}
    for method in METHODS:
        model = build(method)
        shard_(model)
        optimizer = adam(model)
        tunerkit.attach(model, optimizer, total_steps=STEPS)
        processes, rank = distributed.get_world_size(), distributed.get_rank()
        shapes = [parameter.shape for parameter in tunerkit.tuner(model).parameters()]
        longest = sum(-(-shape[0] // processes) * shape[1:].numel() for shape in shapes)
        steps, states = [], []
        for step in batches(processes, rank, processes):
            with Collectives() as before:
                for x, y in step:
                    nn.functional.cross_entropy(model(x), y).backward()
            with Collectives() as counted:
                optimizer.step()
            optimizer.zero_grad()
            steps.append((dict(counted.calls), dict(counted.bytes)))
            with Collectives() as counted:
                injection.training_state(tunerkit.tuner(model))
            states.append((dict(counted.calls), dict(counted.bytes)))
        found[method] = {
            "steps": steps,
            "states": states,
            "longest": longest,
            "parameters": len(shapes),
            "triplets": _triplets(model),
        }
        found[method]["barriers"] = before.calls["allreduce_"], before.bytes["allreduce_"]
        found[method]["values"] = sum(shape.numel() for shape in shapes)
        found[method]["allocations"] = [change.step for change in tunerkit.tuner(model).history]
    return found


def _trains_in_pieces(*, several_meshes: bool) -> bool:
    """AdaLoRA trains as in one process, after evaluations that leave the root whole, and with several meshes.

    With several meshes no sum over processes fits all weights, so hooks see whole ones.
    """
    processes, rank = distributed.get_world_size(), distributed.get_rank()
    model: Any = build("adalora 8 -> 2")
    if several_meshes:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (processes, 1), mesh_dim_names=("r", "s"))
        fsdp.fully_shard(model[0], mesh=mesh)  # whole in each process
    fsdp.fully_shard(model)
    _train_and_evaluate(model, processes, rank, processes)
    one = build("adalora 8 -> 2", shrink=False)
    _train_and_evaluate(one, processes, 0, 1)
    expected, tuner = results(one), tunerkit.tuner(model)
    with tuner.whole():
        found = results(model)
    return (
        tuner.engine.gives_pieces is not several_meshes
        and found["history"] == expected["history"]
        and are_close(found["weights"], expected["weights"])
    )


def _train_and_evaluate(model: nn.Module, processes: int, rank: int, of: int) -> None:
    """Take all steps, each after a forward without a backward; torch clips and steps one mesh at a time."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-2, eps=1e-6, foreach=False)
    tunerkit.attach(model, optimizer, total_steps=STEPS, data_parallel=None if of > 1 else False)
    for step in batches(processes, rank, of):
        for x, y in step:
            (nn.functional.cross_entropy(model(x), y) / len(step)).backward()
        with torch.no_grad():
            model(step[0][0])
        optimizer.step()
        optimizer.zero_grad()


def _triplets(model: nn.Module) -> int:
    return sum(len(getattr(adapter, "mask", ())) for adapter in tunerkit.tuner(model).adapters().values())


def _saves_quietly(folder: str) -> bool:
    """A process that holds nothing of a matrix does not take it for untrained."""
    model = build("lora", rank=1)
    shard_(model)
    optimizer = adam(model)
    tunerkit.attach(model, optimizer)
    train(model, optimizer, distributed.get_world_size(), distributed.get_rank(), distributed.get_world_size())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tunerkit.save(model, f"{folder}/saved")
    return not caught


def _saves_again(folder: str) -> bool:
    """A file is there when `tunerkit.save` returns, also if one like it was written to a place of the same name."""
    model = build("lora")
    tunerkit.attach(model, adam(model))
    if distributed.get_rank() == 0:
        tunerkit.save(model, f"{folder}/alone/kept")
    there = []
    for name, late in (("first", 0), ("second", 0), ("third", 1), ("third", None)):
        if distributed.get_rank() == late:
            time.sleep(0.5)
        there.append(tunerkit.save(model, f"{folder}/{name}/kept").is_file())
    return all(there)


def _waits_for_a_busy_writer(folder: str) -> bool:
    """Process 0 may be busy longer than the patience with a file at another place, if the last one was as it was told.

    One that it has written elsewhere since is an error then.
    """
    model = build("lora")
    tunerkit.attach(model, adam(model))
    first = distributed.get_rank() == 0
    with mock.patch("tunerkit_distributed.writing._PATIENCE", 0.2):
        if first:
            time.sleep(1)
        tunerkit.save(model, f"{folder}/last/patient")
        if first:
            time.sleep(1)
        there = tunerkit.save(model, f"{folder}/best/patient").is_file()
        told = _error(lambda: tunerkit.save(model, f"{folder}/{'one' if first else 'another'}"))
    return there and told.startswith("" if first else "AdapterError: process 0 wrote the same to")


CHECKS = {
    "collectives": _collectives,
    "whole inside": _is_whole_inside,
    "put back": _is_put_back,
    "changes are kept": _keeps_changes,
    "changes are kept after an error": lambda: _keeps_changes(error=True),
    "withheld": _withholds,
    "root": _shards_the_root_again,
    "nested": _nests,
    "other dimensions": _reads_other_dimensions,
    "in pieces": lambda: _trains_in_pieces(several_meshes=False),
    "in pieces of several meshes": lambda: _trains_in_pieces(several_meshes=True),
    "mixed": _mixed,
    "resized": _resized,
    "other seeds": _other_seeds,
    "no seed": _no_seed,
    "no seed, another base": lambda: _other_starts(None),
}
