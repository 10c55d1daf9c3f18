"""Part `operations`: counts of dispatched operations and host waits, which are the same in every run."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import attrs

from benchmarks.speed import contenders as who
from benchmarks.speed.counting import Operations, Waits, count
from benchmarks.speed.marks import Marks
from benchmarks.speed.models import Workload, encoder, small_llama
from benchmarks.speed.settings import Settings, Size
from benchmarks.speed.tables import Row
from tunerkit_testing.product_forms import fused_form

PART = "operations"
Counting = Callable[[], AbstractContextManager[Callable[[], float]]]
PASS_NAMES = (
    who.PEFT_LORA,
    who.PEFT_ADALORA_BARE,
    who.PEFT_ADALORA,
    who.LORA,
    who.ADALORA,
    who.ADALORA_GAMMA,
    who.ADALORA_SHRUNK,
)
PASS_LIMITS = dict.fromkeys((who.LORA, who.ADALORA, who.ADALORA_GAMMA, who.ADALORA_SHRUNK), 22.0)
# Ours with the regulariser is compared with PEFT's, which has one too; otherwise the work would differ.
ALLOCATING = (who.PEFT_ADALORA, who.ADALORA, who.ADALORA_GAMMA, who.ADALORA_TURNED)
FINAL = (who.PEFT_ADALORA_FINAL, who.ADALORA_MASKED, who.ADALORA_SHRUNK)
MASK_STEP, OTHER_STEP, FINAL_STEP = "mask step", "other step", "step of the final phase"
LIMITED = (who.ADALORA, who.ADALORA_GAMMA, who.ADALORA_TURNED)
STEP_LIMITS = {MASK_STEP: 400.0, OTHER_STEP: 150.0}


def measure(settings: Settings) -> list[Row]:
    """Counts of forward and backward, then of the allocators."""
    small = Size(layers=2, hidden=32)
    passes = [encoder(small, attrs.evolve(settings, batch=2, tokens=4)), small_llama(2, settings)]
    rows = [row for workload in passes for row in pass_rows(workload, settings)]
    least, *more = [small_llama(blocks, settings) for blocks in settings.blocks]
    rows += allocator_rows(least, settings, STEP_LIMITS)
    for workload in more:
        # The larger model may cost no more than the smaller one.
        found = {(row.who, row.measure): row.value for row in rows if row.where == least.name}
        rows += allocator_rows(workload, settings, STEP_LIMITS, at_most=found)
    return rows


def pass_rows(workload: Workload, settings: Settings) -> list[Row]:
    """Operations of forward and backward above the floor's, per adapted layer: of the form that large inputs have."""
    floor = count(who.build(who.FLOOR, workload, settings).pass_through)
    where = workload.base.body.__class__.__name__
    rows = []
    for name in PASS_NAMES:
        contender = who.build(name, workload, settings)
        contender.step()  # what is made once, at the first step, is no part of the others
        small = count(contender.pass_through)
        contender.model.zero_grad()  # else the second gradients are added to the first
        with fused_form():  # its counts are the same at every size
            found = count(contender.pass_through)
        above = {
            "forward and backward, per layer": found.total - floor.total,
            "of these no views": found.kernels - floor.kernels,
            "of a small input": small.total - floor.total,
        }
        limits = {"forward and backward, per layer": PASS_LIMITS.get(name)}
        rows += [
            Row(PART, where, name, measure, value / workload.adapted, limit=limits.get(measure))
            for measure, value in above.items()
        ]
    return rows


def allocator_rows(
    workload: Workload,
    settings: Settings,
    limits: dict[str, float],
    at_most: dict[tuple[str, str], float] | None = None,
) -> list[Row]:
    """Operations and waits of the allocator and the regulariser, by kind of step."""
    rows = []
    for name in (*ALLOCATING, *FINAL):
        steps = [FINAL_STEP] if name in FINAL else [MASK_STEP, OTHER_STEP]
        operations, waits = (
            _at_steps(name, workload, settings, _operations),
            _at_steps(name, workload, settings, _waits),
        )
        for step in steps:
            limit = limits.get(step) if name in LIMITED else None
            if limit is not None and at_most is not None:
                limit = min(limit, at_most[name, step])
            rows.append(Row(PART, workload.name, name, step, operations[step], limit=limit))
        for step in steps:
            most = 1.0 if name in LIMITED and step == MASK_STEP else None
            rows.append(Row(PART, workload.name, name, f"host waits, {step}", waits[step], limit=most))
    return rows


@contextmanager
def _operations() -> Iterator[Callable[[], float]]:
    with Operations() as operations:
        yield lambda: operations.total


@contextmanager
def _waits() -> Iterator[Callable[[], float]]:
    with Waits() as waits:
        yield lambda: waits.total


def _at_steps(name: str, workload: Workload, settings: Settings, counter: Counting) -> dict[str, float]:
    """Counts of a contender's own work by kind of step: outside the update, and for PEFT also in the loss."""
    settings = attrs.evolve(settings, delta_t=2)
    reading: list[Callable[[], float]] = [_nothing]
    marks = Marks(lambda: reading[0]())
    contender = who.build(name, workload, settings, marks)
    in_loss = _in_loss(name, workload, settings, counter)
    found = {}
    # What is made once, at the first step, is no part of the others.
    contender.take(2 - contender.steps % 2)
    for step in (OTHER_STEP, MASK_STEP):
        with counter() as reading[0]:
            contender.step()
        reading[0] = _nothing
        found[step] = in_loss + marks.before + marks.after
    return {**found, FINAL_STEP: found[OTHER_STEP]}


def _nothing() -> float:
    return 0.0


def _in_loss(name: str, workload: Workload, settings: Settings, counter: Counting) -> float:
    """The cost of PEFT's regulariser: the additional count of forward and backward, of which it is a part."""
    if name not in (who.PEFT_ADALORA, who.PEFT_ADALORA_FINAL):
        return 0.0
    counts = []
    for each in (who.PEFT_ADALORA, who.PEFT_ADALORA_BARE):
        contender = who.build(each, workload, settings)
        with counter() as read:
            contender.pass_through()
            counts.append(read())
    return counts[0] - counts[1]
