"""Trains wrapped models in processes of their own, which import these functions by name."""

import copy
import os
import pickle
from typing import Any

import torch
from torch import nn

import tunerkit
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
