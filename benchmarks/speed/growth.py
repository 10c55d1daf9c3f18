"""Part `growth`: how the cost of allocating and wrapping grows with the number of adapted layers."""

import time

import numpy as np

from benchmarks.speed import contenders as who
from benchmarks.speed.marks import Marks
from benchmarks.speed.models import Workload, small_llama
from benchmarks.speed.operations import MASK_STEP, OTHER_STEP
from benchmarks.speed.settings import Settings
from benchmarks.speed.statistics import median, middle, one_kind, typical
from benchmarks.speed.steps import kinds_of
from benchmarks.speed.tables import Row, estimated
from benchmarks.speed.timing import interleave

PART = "growth"
NAMES = (who.PEFT_ADALORA, who.LORA, who.ADALORA, who.ADALORA_GAMMA, who.ADALORA_SHRUNK)
WRAPPED = (who.PEFT_LORA, who.PEFT_ADALORA, who.LORA, who.ADALORA)


def measure(settings: Settings) -> list[Row]:
    """A series of small Llamas."""
    workloads = [small_llama(blocks, settings) for blocks in settings.growth_blocks]
    return [row for each in workloads for row in (*allocator_rows(each, settings), *wrap_rows(each, settings))]


def allocator_rows(workload: Workload, settings: Settings) -> list[Row]:
    """CPU time of the work outside the update, by kind of step and in proportion; PEFT's without its regulariser."""
    marks = {name: Marks(time.process_time) for name in NAMES}
    training = {name: who.build(name, workload, settings, marks[name]) for name in NAMES}
    read: dict[str, list[float]] = {name: [] for name in NAMES}

    def step(name: str) -> None:
        training[name].step()
        read[name].append(marks[name].before + marks[name].after)

    # The default binds each name: a closure would see the last one.
    calls = {name: (lambda name=name: step(name)) for name in NAMES}
    interleave(calls, rounds=settings.pairs, seed=settings.seed, warmup=settings.warmup)
    kinds = kinds_of(settings)
    rows = []
    for name, found in read.items():
        own = 1e3 * np.array(found[settings.warmup :])
        for kind, which in enumerate((OTHER_STEP, MASK_STEP)):
            rows.append(Row(PART, workload.name, name, f"{which}, ms", median(own[kinds == kind])))
        rows.append(estimated(PART, workload.name, name, "allocator, ms", middle(own, kinds, seed=settings.seed)))
        per_layer = 1e3 * float(typical(own, kinds)) / workload.adapted
        rows.append(Row(PART, workload.name, name, "allocator per layer, µs", per_layer))
    return rows


def wrap_rows(workload: Workload, settings: Settings) -> list[Row]:
    """The time of wrapping."""
    fresh = {name: workload.model() for name in WRAPPED}

    def prepare(name: str) -> None:
        fresh[name] = workload.model()

    # The default binds each name: a closure would see the last one.
    calls = {name: (lambda name=name: who.wrap(name, fresh[name], workload, settings)) for name in WRAPPED}
    rounds = max(2, settings.pairs // 6)  # PEFT takes more than a second at the largest
    times = interleave(calls, rounds=rounds, seed=settings.seed, warmup=1, before_each=prepare)
    return [
        estimated(PART, workload.name, name, "wrap, ms", middle(1e3 * found, one_kind(rounds), seed=settings.seed))
        for name, found in times.items()
    ]
