"""What a test runs in a process of its own: a spawned process imports its function by name."""

import copy
import os
from typing import Any

import torch
from torch import Tensor, nn

import tunerkit


def train_two_steps(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Train a copy of the model, which is sent as shared memory, and say what came of it."""
    torch.set_num_threads(1)
    model = copy.deepcopy(model)
    before = model(x).detach()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
    tunerkit.attach(model, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    tuner = tunerkit.tuner(model)
    return {
        "process": os.getpid(),
        "before": before,
        "after": model(x).detach(),
        "steps": tuner.steps,
        "ranks": tuner.ranks(),
    }
