"""The methods beside each other: each at the learning rate that is its best on validation rows, scored on test rows."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import attrs

from benchmarks.quality import methods
from benchmarks.quality.rates import rate_of
from benchmarks.quality.runs import Run
from benchmarks.quality.store import Row
from benchmarks.quality.tasks import PICTURES

LOWEST, USUAL = 1, 8  # the ranks that are compared
# None of these were seen by the choice of tasks, of learning rates or of AdaLoRA's defaults. Those from 10 to 19 had
# been scored at rank 1 before a defect there was found and mended, so rank 1 has others.
SEEDS = tuple(range(20, 30))
FEW = SEEDS[:5]
USUAL_SEEDS = tuple(range(10, 15))
# At whose best rates a method runs besides its own.
_ALSO_AT = {
    methods.LORA: (methods.ADALORA,),
    methods.ADALORA: (methods.LORA,),
    methods.PEFT_ADALORA: (methods.LORA,),
}


@attrs.frozen
class Entry:
    """A method at a rank (0 where it has none), and the seeds that its test scores are of."""

    method: str
    rank: int
    seeds: tuple[int, ...]


def entries(task: str, *, has_headroom: bool, later: bool = False) -> Iterator[Entry]:
    """What is compared on a task. PEFT's AdaLoRA knows no convolutions, so it is not there for pictures.

    ``later``: its headroom showed when the tasks had been fixed, so it has the two contenders alone at the lowest rank.
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
    """The runs on test rows of each entry whose learning rate is known, by task; ``made`` finds the rows for that.

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
