"""Part `small`: the CPU time that an adapter adds to one layer for a small input, as in the generation of a token."""

import gc
import itertools
import time
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from benchmarks.speed import contenders as who
from benchmarks.speed.models import Workload
from benchmarks.speed.settings import Settings
from benchmarks.speed.tables import Row
from benchmarks.speed.timing import Call, interleave

PART = "small"
NAMES = (who.FLOOR, who.PEFT_LORA, who.PEFT_ADALORA_BARE, who.LORA, who.ADALORA)
# Each contender and those it is compared with: the limits of the median of all shapes, and of the largest.
LIMITS: dict[str, dict[str, tuple[float, float | None]]] = {
    who.LORA: {who.PEFT_LORA: (0.95, 1.05)},
    who.ADALORA: {who.PEFT_ADALORA_BARE: (0.95, 1.05), who.PEFT_LORA: (1.2, None)},
}
FORWARD, BACKWARD = "forward", "forward and backward"
EVERYWHERE = "all shapes"
_CALLS = 5  # of each contender, timed together: few, so that some are not interrupted
_ROUNDS = 10  # times as many as of a training step, since only the least counts


def thread_seconds(call: Call) -> float:
    """The CPU time of this thread: other processes hardly change it."""
    began = time.thread_time()
    call()
    return time.thread_time() - began


def measure(settings: Settings) -> list[Row]:
    """All widths and numbers of rows, without gradients and with backward, with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()  # else collecting garbage takes most of the time
    try:
        found = added(settings)
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)
    return [row for where, times in found.items() for row in shape_rows(where, times)] + summary(found)


def added(settings: Settings, *, clock: Callable[[Call], float] = thread_seconds) -> dict[str, dict[str, float]]:
    """Seconds that each contender adds to a call of the layer, by shape: the least of all rounds, less the floor's."""
    shapes = itertools.product(settings.small_rows, settings.small_widths, (FORWARD, BACKWARD))
    calls = {
        (f"{rows}x{width}, {how}", name): _calls(name, rows, width, how, settings)
        for rows, width, how in shapes
        for name in NAMES
    }
    by_text = {f"{where}: {name}": call for (where, name), call in calls.items()}
    rounds = _ROUNDS * settings.pairs
    times = interleave(by_text, rounds=rounds, seed=settings.seed, warmup=settings.warmup, clock=clock)
    found: dict[str, dict[str, float]] = {}
    for where, name in calls:
        least, floor = (float(np.min(times[f"{where}: {each}"])) / _CALLS for each in (name, who.FLOOR))
        if name != who.FLOOR:
            found.setdefault(where, {})[name] = least - floor
    return found


def shape_rows(where: str, times: dict[str, float]) -> list[Row]:
    """Microseconds of each contender at one shape, and ratios."""
    rows = [Row(PART, where, name, "added, µs", 1e6 * found) for name, found in times.items()]
    return rows + [
        Row(PART, where, name, f"added / {other}'s", times[name] / times[other])
        for name, others in LIMITS.items()
        for other in others
    ]


def summary(found: dict[str, dict[str, float]]) -> list[Row]:
    """The median and the largest of the ratios at all shapes, with their limits."""
    rows = []
    for name, others in LIMITS.items():
        for other, (typical, largest) in others.items():
            ratios = [times[name] / times[other] for times in found.values()]
            rows.append(Row(PART, EVERYWHERE, name, f"median / {other}'s", float(np.median(ratios)), limit=typical))
            rows.append(Row(PART, EVERYWHERE, name, f"largest / {other}'s", max(ratios), limit=largest))
    return rows


def _calls(name: str, rows: int, width: int, how: str, settings: Settings) -> Call:
    """Several calls of one contender's layer, with the adapter in training mode."""
    torch.manual_seed(settings.seed)
    base: nn.Module = nn.Sequential(nn.Linear(width, width)).requires_grad_(False)
    x, slope = torch.randn(rows, width, requires_grad=how == BACKWARD), torch.randn(rows, width)
    workload = Workload(f"{rows}x{width}", cast(Any, base), ("0",), x, slope)
    model = base if name == who.FLOOR else who.wrap(name, base, workload, settings)
    model(x)  # a wrapped model checks its first forward alone
    layer = next(module for path, module in model.named_modules() if path.split(".")[-1] == "0")
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]

    def forward() -> None:
        with torch.no_grad():
            for _ in range(_CALLS):
                layer(x)

    def backward() -> None:
        for _ in range(_CALLS):
            torch.autograd.grad(layer(x), wanted, slope)

    return forward if how == FORWARD else backward
