"""How a process ends after a barrier. Each process imports this by name."""

import atexit
import json
import os
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, nn

TASKS = Path("/proc/self/task")  # Linux lists the threads of a process there
_SECONDS = 60
_kept: list[object] = []  # to the end of the interpreter, as a script's variables


def _threads() -> int:
    return len(os.listdir(TASKS))


def end(rank: int, folder: str, leaves: bool) -> None:
    """Run one barrier and end, as a script does.

    It writes the number of threads before, with the default group, with the host group, and at the end.

    Args:
        rank: The number of this process.
        folder: Where the processes find each other and write.
        leaves: Whether the script destroys its process groups.
    """
    torch.set_num_threads(1)
    nn.Linear(2, 2)(torch.ones(2)).sum().backward()  # autograd may start threads
    counted = [_threads()]
    atexit.register(_write, Path(folder, str(rank)), counted, leaves)
    from tunerkit_distributed.barrier import Barrier  # here, so that its exit handler runs before the one above

    place = f"file://{folder}/store{leaves}"
    distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=2, timeout=timedelta(minutes=20))
    counted.append(_threads())
    net, own = nn.Linear(2, 2), Barrier()
    _kept.append(own)
    own.open_(["default"], net, 1)
    own.at_forward()
    counted.append(_threads())
    distributed.barrier()
    if leaves:
        distributed.destroy_process_group()


def _write(file: Path, counted: list[int], leaves: bool) -> None:
    """Write ``counted``, and how many threads are left. One that was joined may be listed for a moment more."""
    before, with_default, _ = counted
    end = time.monotonic() + _SECONDS
    while _threads() > (before if leaves else with_default) and time.monotonic() < end:
        time.sleep(0.01)
    file.write_text(json.dumps([*counted, _threads()]), encoding="utf-8")
