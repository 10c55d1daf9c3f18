"""Part `gpu`: steps and memory at Llama's shapes, in bf16, if there is a GPU."""

import attrs
import torch

from benchmarks.speed import memory, steps
from benchmarks.speed.models import LLAMA_SHAPES, large_llama
from benchmarks.speed.settings import Settings
from benchmarks.speed.tables import Row
from benchmarks.speed.timing import cuda_seconds

PART = "gpu"
BATCH, TOKENS = 4, 512


def measure(settings: Settings) -> list[Row]:
    """One shape after the other; all contenders of a shape share its base. Without a GPU there are no rows."""
    if not torch.cuda.is_available():
        return []
    settings = attrs.evolve(settings, batch=BATCH, tokens=TOKENS)
    rows = []
    for name, shape in LLAMA_SHAPES.items():
        workload = large_llama(name, shape, settings, "cuda")
        rows += steps.rows_of(name, steps.time_steps(workload, settings, clock=cuda_seconds), settings, PART)
        rows += [attrs.evolve(row, part=PART) for row in memory.rows_of(workload, settings)]
    return rows
