"""How a process that `torch.multiprocessing.spawn` started joins the other one of its group, and leaves it."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed

_MINUTES = 20  # until a process gives up on the other one, on a machine that is busy with other things


@contextmanager
def joined(rank: int, folder: str) -> Iterator[None]:
    """Inside the block, this is one of two processes, with one thread each; at its end the process exits.

    Args:
        rank: which of the two processes this is; `torch.multiprocessing.spawn` gives it.
        folder: where the processes meet.
    """
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=_MINUTES),
    )
    yield
    distributed.barrier()
    distributed.destroy_process_group()
    # At the interpreter's end torch may abort while it takes down gloo's threads ("terminate called without an active
    # exception"), though all is written. An error above leaves the block as usual, and spawn reports it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
