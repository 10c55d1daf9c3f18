"""The comparison of methods on test rows, each at the learning rate that is its best on validation rows."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import attrs

from benchmarks.quality import methods
from benchmarks.quality.rates import rate_of
from benchmarks.quality.runs import Run
from benchmarks.quality.store import Row
from benchmarks.quality.tasks import PICTURES

LOWEST, USUAL = 1, 8  # the ranks that are compared
# No seed was used to choose tasks, learning rates or AdaLoRA's defaults. Seeds 10 to 19 had been scored at rank 1
# before a defect there was found and fixed, so rank 1 uses other seeds.
SEEDS = tuple(range(20, 30))
FEW = SEEDS[:5]
USUAL_SEEDS = tuple(range(10, 15))
# The methods at whose best rates a method also runs, besides its own.
_ALSO_AT = {
    methods.LORA: (methods.ADALORA,),
    methods.ADALORA: (methods.LORA,),
    methods.PEFT_ADALORA: (methods.LORA,),
}


@attrs.frozen
class Entry:
    """A method at a rank (0 if it has none), and the seeds of its test scores."""

    method: str
    rank: int
    seeds: tuple[int, ...]


def entries(task: str, *, has_headroom: bool, later: bool = False) -> Iterator[Entry]:
    """The methods compared on a task. PEFT's AdaLoRA does not support convolutions, so it is not run on image tasks.

    ``later``: the task's headroom showed after the tasks had been fixed. At the lowest rank it has only LoRA and
    AdaLoRA.
    """
    if has_headroom or later:
        yield Entry(methods.LORA, LOWEST, SEEDS)
        yield Entry(methods.ADALORA, LOWEST, SEEDS)
    if has_headroom:
        if task not in PICTURES:
            yield Entry(methods.PEFT_ADALORA, LOWEST, FEW)
        yield Entry(methods.HEAD_ONLY, 0, FEW)
        yield Entry(methods.FULL, 0, FEW)
    yield Entry(methods.LORA, USUAL, USUAL_SEEDS)
    yield Entry(methods.ADALORA, USUAL, USUAL_SEEDS)


def contest(compared: Mapping[str, Iterable[Entry]], made: Callable[[Run], Sequence[Row]]) -> list[Run]:
    """The test runs of each entry whose learning rate is known, by task. ``made`` finds the rows that choose the rate.

    AdaLoRA and PEFT's also run at LoRA's rate, and LoRA at AdaLoRA's.
    """
    runs = []
    for task, found in compared.items():
        known: dict[Entry, float] = {}
        for entry in found:
            run = Run(task, entry.method, entry.rank, 0.0, 0, tested=True)
            rate = rate_of(run, made(run), by_all_seeds=True)
            if rate is not None:
                known[entry] = rate
        for entry, rate in known.items():
            run = Run(task, entry.method, entry.rank, 0.0, 0, tested=True)
            others = _ALSO_AT.get(entry.method, ())
            at = {rate, *(its for each, its in known.items() if each.rank == entry.rank and each.method in others)}
            runs += [attrs.evolve(run, learning_rate=each, seed=seed) for each in sorted(at) for seed in entry.seeds]
    return runs
