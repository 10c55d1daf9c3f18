"""Part `allocator`: the time of the allocator and the regulariser by phase, and its share of a step."""

import time

import attrs
import numpy as np

from benchmarks.speed import contenders as who
from benchmarks.speed.marks import Marks
from benchmarks.speed.models import Workload, encoders
from benchmarks.speed.settings import Settings
from benchmarks.speed.statistics import Kinds, Pairs, median, ratio, typical
from benchmarks.speed.steps import kinds_of
from benchmarks.speed.tables import Row, estimated
from benchmarks.speed.timing import Times, interleave

PART = "allocator"
ALLOCATING = (who.PEFT_ADALORA, who.ADALORA, who.ADALORA_GAMMA, who.ADALORA_TURNED)
FINAL = (who.PEFT_ADALORA_FINAL, who.ADALORA_MASKED, who.ADALORA_SHRUNK)
LIMIT, LIMITED_SIZE = 0.03, "12x256"


@attrs.frozen(eq=False)
class Spent:
    """Seconds by round, (rounds,) each: the whole step, the work before the update, and the work after it."""

    step: Times
    before: Times
    after: Times


def measure(settings: Settings) -> list[Row]:
    """All encoders."""
    return [row for workload in encoders(settings) for row in rows_of(workload, settings)]


def rows_of(workload: Workload, settings: Settings) -> list[Row]:
    """The phases of methods that allocate, and the remaining cost once ranks are final."""
    spent = time_phases(workload, settings)
    kinds = kinds_of(settings)
    rows = [row for name in ALLOCATING for row in _phase_rows(workload.name, name, spent[name], kinds, settings)]
    for name in FINAL:
        rows.append(Row(PART, workload.name, name, "masks, ms", 1e3 * float(np.median(spent[name].after))))
    return rows


def time_phases(workload: Workload, settings: Settings) -> dict[str, Spent]:
    """Each contender's seconds by round and phase. PEFT's regulariser is the difference to a step without it."""
    names = (*ALLOCATING, *FINAL, who.PEFT_ADALORA_BARE)
    marks = {name: Marks(time.perf_counter) for name in names}
    training = {name: who.build(name, workload, settings, marks[name]) for name in names}
    read: dict[str, list[tuple[float, float]]] = {name: [] for name in names}

    def step(name: str) -> None:
        training[name].step()
        read[name].append((marks[name].before, marks[name].after))

    # The default binds each name: a closure would see the last one.
    calls = {name: (lambda name=name: step(name)) for name in names}
    times = interleave(calls, rounds=settings.pairs, seed=settings.seed, warmup=settings.warmup)
    inside = {name: np.array(found[settings.warmup :]) for name, found in read.items()}
    spent = {name: Spent(times[name], inside[name][:, 0], inside[name][:, 1]) for name in names}
    in_loss = times[who.PEFT_ADALORA] - times[who.PEFT_ADALORA_BARE]
    spent[who.PEFT_ADALORA] = attrs.evolve(spent[who.PEFT_ADALORA], before=in_loss)
    return spent


def _phase_rows(where: str, name: str, spent: Spent, kinds: Kinds, settings: Settings) -> list[Row]:
    own = spent.before + spent.after
    limit = LIMIT if where == LIMITED_SIZE and not name.startswith("PEFT") else None
    share = ratio(Pairs(top=own, bottom=spent.step, kinds=kinds), seed=settings.seed)
    averaging, mask_step = (median(spent.after[kinds == kind]) for kind in (0, 1))
    phases = {
        "regulariser": median(spent.before),
        "averaging": averaging,
        f"allocation and masks, every {settings.delta_t}": mask_step - averaging,
        "per step": float(typical(own, kinds)),
    }
    rows = [Row(PART, where, name, f"{phase}, ms", 1e3 * found) for phase, found in phases.items()]
    return [*rows, estimated(PART, where, name, "share of the step", share, limit)]
