"""A training of growing ranks in which two processes have half of each batch, in DistributedDataParallel."""

from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

import tunerkit
from plugins.methods.tests.test_growing import STEPS, planted, wrapped
from tests.support.two_processes import joined


def run(rank: int, folder: str) -> None:
    """Train in one of the two processes, and write what came of it."""
    with joined(rank, folder):
        model, optimizer = wrapped()
        parallel: Any = DistributedDataParallel(model)
        teacher = planted()
        for step in range(1, STEPS + 1):
            x = torch.randn(64, 3, 16, generator=torch.Generator().manual_seed(step)).chunk(2)[rank]
            (parallel(x) - teacher(x)).square().sum(1).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        tuner = tunerkit.tuner(model)
        torch.save((tuner.ranks(), [each.detach() for each in tuner.parameters()]), Path(folder) / f"{rank}.pt")
