"""Part `steps`: the cost of a training step above the frozen floor."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from benchmarks.speed import contenders as who
from benchmarks.speed.models import Workload, encoders
from benchmarks.speed.settings import Settings
from benchmarks.speed.statistics import Kinds, Pairs, geometric_mean, middle, ratio, typical
from benchmarks.speed.tables import Row, estimated
from benchmarks.speed.timing import Call, Times, interleave, seconds

PART = "steps"
NAMES = (
    who.FLOOR,
    who.PEFT_LORA,
    who.PEFT_LORA_AGAIN,
    who.PEFT_ADALORA,
    who.LORA,
    who.ADALORA,
    who.ADALORA_GAMMA,
    who.ADALORA_SHRUNK,
)
LIMITS = {who.LORA: 0.85, who.ADALORA: 1.0, who.ADALORA_GAMMA: 1.0, who.ADALORA_SHRUNK: 0.85}
RATIO = "overhead / PEFT LoRA's"


def measure(settings: Settings) -> list[Row]:
    """All encoders, and the geometric mean of their ratios, to which the limits apply."""
    times = {workload.name: time_steps(workload, settings) for workload in encoders(settings)}
    return [row for name, found in times.items() for row in rows_of(name, found, settings)] + means(times, settings)


def time_steps(
    workload: Workload, settings: Settings, *, clock: Callable[[Call], float] = seconds, names: Sequence[str] = NAMES
) -> dict[str, Times]:
    """Seconds of each contender's step in each round; all contenders are trained in the same rounds."""
    training = who.build_all(names, workload, settings)
    calls = {name: contender.step for name, contender in training.items()}
    return interleave(calls, rounds=settings.pairs, seed=settings.seed, warmup=settings.warmup, clock=clock)


def rows_of(where: str, times: Mapping[str, Times], settings: Settings, part: str = PART) -> list[Row]:
    """Step times, overheads and their ratios for one workload."""
    kinds = kinds_of(settings)
    rows = []
    for name in times:
        rows.append(estimated(part, where, name, "step, ms", middle(1e3 * times[name], kinds, seed=settings.seed)))
        if name != who.FLOOR:
            pairs = overheads(times, name, kinds)
            rows += [
                estimated(part, where, name, "overhead, ms", middle(1e3 * pairs.top, kinds, seed=settings.seed)),
                Row(part, where, name, "mean overhead, ms", 1e3 * float(np.mean(pairs.top))),
                Row(part, where, name, "overhead, share of the floor", _share(pairs.top, times[who.FLOOR], kinds)),
            ]
            if name != who.PEFT_LORA:
                rows.append(estimated(part, where, name, RATIO, ratio(pairs, seed=settings.seed)))
    return rows


def means(times: Mapping[str, Mapping[str, Times]], settings: Settings) -> list[Row]:
    """The geometric means over the workloads, with their limits."""
    kinds = kinds_of(settings)
    rows = []
    for name in [name for name in NAMES if name not in (who.FLOOR, who.PEFT_LORA)]:
        several = [overheads(found, name, kinds) for found in times.values()]
        found = geometric_mean(several, seed=settings.seed)
        rows.append(estimated(PART, "geometric mean", name, RATIO, found, LIMITS.get(name)))
    return rows


def overheads(times: Mapping[str, Times], name: str, kinds: Kinds) -> Pairs:
    """A contender's and PEFT LoRA's time above the floor's in the same round."""
    floor = times[who.FLOOR]
    return Pairs(top=times[name] - floor, bottom=times[who.PEFT_LORA] - floor, kinds=kinds)


def kinds_of(settings: Settings) -> Kinds:
    """1 for rounds with a mask step of the contenders that allocate, 0 for the others."""
    steps = np.arange(settings.warmup + 1, settings.warmup + settings.pairs + 1)
    kinds: Kinds = (steps % settings.delta_t == 0).astype(np.int64)
    return kinds


def _share(overhead: Times, floor: Times, kinds: Kinds) -> float:
    return float(typical(overhead, kinds) / typical(floor, kinds))
