"""The operations and the time of a step at 448 targets: two processes of one thread each, beside one process."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tunerkit
from tests.support import two_processes
from tests.support.collectives import Collectives
from tunerkit.layers import torch_private

TARGETS, WIDTH, STEPS = 448, 64, 12
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora, rank 8": ("lora", {"rank": 8, "targets": "all-linear"}),
    "adalora, 12 to 8": ("adalora", {"init_rank": 12, "target_rank": 8, "targets": "all-linear"}),
}


class Residual(nn.Module):
    """Linear layers one after the other, so that values neither grow nor vanish."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(TARGETS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) / TARGETS
        return x


def steps(method: str) -> tuple[int, int, int, float]:
    """Train; of one step, the operations without views, the views, the collectives, and the median time in ms."""
    torch.manual_seed(0)
    name, config = METHODS[method]
    model = tunerkit.wrap(Residual(), name, config, seed=0)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    tunerkit.attach(model, optimizer, total_steps=10 * STEPS)
    x, times = torch.randn(4, WIDTH), []
    for _ in range(STEPS):
        started = time.perf_counter()
        _step(model, optimizer, x)
        times.append(1000 * (time.perf_counter() - started))
    counted, views = 0, 0

    def dispatch(mode: object, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        nonlocal counted, views
        views += function.is_view
        counted += not function.is_view
        return function(*args, **(kwargs or {}))

    with Collectives() as found:
        _step(model, optimizer, x)
    with type("Mode", (torch_private.dispatch_mode(),), {"__torch_dispatch__": dispatch})():
        _step(model, optimizer, x)
    return counted, views, sum(found.calls.values()), statistics.median(times[2:])


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def be_one(rank: int, folder: str, method: str) -> None:
    """Be one of two processes; what `steps` found is written to ``{folder}/{rank}.pt``."""
    with two_processes.joined(rank, folder):
        torch.save(steps(method), f"{folder}/{rank}.pt")


def main() -> None:
    """Print one row for each method and number of processes."""
    torch.set_num_threads(1)
    print(f"{TARGETS} targets of {WIDTH} x {WIDTH}; operations of one step without an allocation, in each process\n")
    print("| method | processes | operations | views | collectives among them | ms a step |\n|---|---|---|---|---|---|")
    for method in METHODS:
        rows = [(1, steps(method))]
        with tempfile.TemporaryDirectory() as folder:
            two_processes.spawn(be_one, (folder, method))
            rows.append((2, torch.load(Path(folder) / "0.pt")))
        for processes, (counted, views, collectives, ms) in rows:
            print(f"| {method} | {processes} | {counted:,} | {views:,} | {collectives} | {ms:.0f} |", flush=True)
