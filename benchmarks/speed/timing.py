"""Interleaved timing: in each round every contender is timed once, in a changing order."""

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

Call = Callable[[], object]
Times = NDArray[np.float64]


def seconds(call: Call) -> float:
    """How long ``call`` takes by the wall clock."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def cuda_seconds(call: Call) -> float:
    """How long ``call`` keeps the GPU's current stream busy."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began.record()
    call()
    ended.record()
    torch.cuda.synchronize()
    milliseconds: float = began.elapsed_time(ended)
    return milliseconds / 1000


def orders(names: Sequence[str], seed: int) -> Iterator[list[str]]:
    """The order of each round: a Williams design, rotated by one each time, with names reshuffled for each design.

    In each design every contender is at each place equally often, and follows every other once (twice if their number
    is odd). Names are reshuffled because some contenders have longer steps at fixed intervals.
    """
    generator = np.random.default_rng(seed)
    count = len(names)
    zigzag = [place // 2 if place % 2 == 0 else count - 1 - place // 2 for place in range(count)]
    while True:
        drawn = list(generator.permutation(names))
        for first in (zigzag, zigzag[::-1])[: 1 + count % 2]:
            for shift in range(count):
                yield [drawn[(place + shift) % count] for place in first]


def interleave(
    calls: Mapping[str, Call],
    *,
    rounds: int,
    seed: int,
    warmup: int = 0,
    clock: Callable[[Call], float] = seconds,
    before_each: Callable[[str], None] | None = None,
) -> dict[str, Times]:
    """Seconds of each call in each of ``rounds``, after ``warmup`` more; garbage is collected between rounds only.

    ``before_each`` prepares the named call and is not timed.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    was_enabled = gc.isenabled()
    try:
        for order in itertools.islice(orders(list(calls), seed), warmup + rounds):
            gc.collect()
            gc.disable()
            for name in order:
                if before_each is not None:
                    before_each(name)
                found[name].append(clock(calls[name]))
    finally:
        if was_enabled:
            gc.enable()
    return {name: np.array(times[warmup:]) for name, times in found.items()}
