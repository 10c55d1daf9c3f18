"""The runs that are made together, by name."""

import itertools
from collections.abc import Callable

from benchmarks.quality import methods
from benchmarks.quality.runs import Run
from benchmarks.quality.tasks import TASKS

HEADROOM_RANKS = (1, 2, 4, 8, 16)
HEADROOM_RATES = (1e-3, 2e-3)
HEADROOM_SEEDS = (0, 1, 2)


def headroom() -> list[Run]:
    """Our LoRA over ranks, on validation rows alone: what a task's score gains from rank at all."""
    return [
        Run(task, methods.LORA, rank, rate, seed)
        for seed, rate, task, rank in itertools.product(HEADROOM_SEEDS, HEADROOM_RATES, TASKS, HEADROOM_RANKS)
    ]


GRIDS: dict[str, Callable[[], list[Run]]] = {"headroom": headroom}
