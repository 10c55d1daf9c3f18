"""Measure how much memory is free for training."""

import ctypes
import sys
from pathlib import Path
from typing import Final

import torch

GIB: Final = 2**30
# What may be planned with: the estimate is rough, and an allocator cannot use all that is free.
_SHARE: Final = 0.8
# The limits of a container, of version 2 and version 1 of Linux's control groups.
_LIMITS: Final = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def free_bytes(device: torch.device, limit: float | None = None) -> int | None:
    """Return the bytes that a training may still allocate on a device; None if unknown.

    Args:
        device: The device.
        limit: The most bytes that the process may use, including those in use now; None for no limit.
    """
    free: int | None
    if device.type == "cpu":
        import psutil  # comes with accelerate

        free, taken = psutil.virtual_memory().available, psutil.Process().memory_info().rss
        free = min([free, *(most - taken for most in map(_number_in, _LIMITS) if most is not None)])
    elif device.type == "cuda":
        taken = torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - taken
    else:
        return None
    return free if limit is None else min(free, int(limit) - taken)


def _number_in(file: Path) -> int | None:
    text = file.read_text().strip() if file.is_file() else ""
    return int(text) if text.isdecimal() else None


def fits(needed: int, free: int | None) -> bool:
    """Whether a step of ``needed`` bytes fits into `_SHARE` of the ``free`` bytes; True if these are unknown."""
    return free is None or needed <= _SHARE * free


def give_back() -> None:
    """Return freed memory to the system. glibc would keep it in fragments that larger blocks cannot use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
