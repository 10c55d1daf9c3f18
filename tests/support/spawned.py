"""Trains wrapped models in processes of their own, which import these functions by name."""

import copy
import os
import pickle
from typing import Any

import torch
from torch import Tensor, nn

import tunerkit
from tests.support import two_processes
from tunerkit_testing import small


def check_trains_in_a_worker(model: nn.Module) -> None:
    """A worker that is sent a wrapped `small.net` has its outputs and ranks, and trains it as this process would."""
    tuner = tunerkit.tuner(model)
    ranks, steps = tuner.ranks(), tuner.steps
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.apply(train_two_steps, (model,))
    here = train_two_steps(pickle.loads(pickle.dumps(model)))
    assert there["process"] != here["process"]
    assert torch.equal(there["before"], model(small.X))
    assert torch.equal(there["after"], here["after"])
    assert not torch.allclose(there["after"], there["before"])
    assert (there["steps"], there["ranks"]) == (2, ranks) == (here["steps"], here["ranks"])
    assert (tuner.steps, tuner.ranks()) == (steps, ranks)


def train_two_steps(model: nn.Module) -> dict[str, Any]:
    """Train a copy for two steps: the process's id, the outputs before and after, the steps and the ranks."""
    torch.set_num_threads(1)
    # torch sends tensors between processes as shared memory: the other process's model would be trained.
    model = copy.deepcopy(model)
    before = model(small.X).detach()
    optimizer = torch.optim.SGD(small.trainable(model), lr=0.2)
    tunerkit.attach(model, optimizer, total_steps=20)
    small.train(model, optimizer, 2)
    tuner = tunerkit.tuner(model)
    return {
        "process": os.getpid(),
        "before": before,
        "after": model(small.X).detach(),
        "steps": tuner.steps,
        "ranks": tuner.ranks(),
    }


def train_in_parallel(rank: int, model: nn.Module, x: Tensor, labels: Tensor, total: int, folder: str) -> None:
    """Train a copy of a wrapped classifier under DDP, on every second row, into ``{folder}/{rank}.pt``."""
    with two_processes.joined(rank, folder):
        model = copy.deepcopy(model)  # sent as shared memory, which both processes would train
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(small.trainable(parallel), lr=2e-2)
        tunerkit.attach(parallel, optimizer, total_steps=total)
        for _ in range(total):
            optimizer.zero_grad()
            nn.functional.cross_entropy(parallel(x[rank::2]), labels[rank::2]).backward()
            optimizer.step()
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
