"""What the tests run in processes of their own: a spawned process imports its function by name."""

import copy
import os
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

import tunerkit


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor, count: int) -> None:
    """Take ``count`` steps on one batch."""
    for _ in range(count):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()


def train_two_steps(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Any]:
    """Attach the model anew, train it for two steps and say what came of it."""
    torch.set_num_threads(1)
    # torch sends tensors between processes as shared memory: the other process's model would be trained.
    model = copy.deepcopy(model)
    before = model(x).detach()
    tuner = tunerkit.tuner(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tunerkit.attach(model, optimizer, total_steps=20)
    steps(model, optimizer, x, labels, 2)
    return {
        "process": os.getpid(),
        "before": before,
        "after": model(x).detach(),
        "steps": tuner.steps,
        "ranks": tuner.ranks(),
    }


def train_in_parallel(rank: int, model: nn.Module, x: Tensor, labels: Tensor, total: int, folder: str) -> None:
    """One of two processes: train on every second row under DDP and write down the result."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    model = copy.deepcopy(model)  # sent as shared memory, which both processes would train
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in parallel.parameters() if p.requires_grad], lr=2e-2)
    tunerkit.attach(parallel, optimizer, total_steps=total)
    steps(parallel, optimizer, x[rank::2], labels[rank::2], total)
    tuner = tunerkit.tuner(parallel)
    with torch.no_grad():
        output = model(x)
    result = {
        "ranks": tuner.ranks(),
        "steps": [change.step for change in tuner.history],
        "weights": model.state_dict(),
        "output": output,
    }
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
