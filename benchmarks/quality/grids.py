"""The runs that are made together, by name."""

import itertools
from collections.abc import Callable

from benchmarks.quality import methods
from benchmarks.quality.runs import Run
from benchmarks.quality.tasks import TASKS

# The ends of the curve come first: they say whether a task has headroom.
HEADROOM_RANKS = (1, 8, 2, 4, 16)
HEADROOM_SEEDS = (0, 1)


def lora_rates(rank: int) -> tuple[float, ...]:
    """Learning rates to choose from: with more triplets ΔW moves farther at the same rate."""
    return (1e-3, 2e-3, 4e-3) if rank < 8 else (5e-4, 1e-3, 2e-3)


def headroom() -> list[Run]:
    """Our LoRA over ranks, on validation rows alone: what a task's score gains from rank at all."""
    return [
        Run(task, methods.LORA, rank, rate, seed)
        for seed, rank in itertools.product(HEADROOM_SEEDS, HEADROOM_RANKS)
        for rate, task in itertools.product(lora_rates(rank), TASKS)
    ]


GRIDS: dict[str, Callable[[], list[Run]]] = {"headroom": headroom}
