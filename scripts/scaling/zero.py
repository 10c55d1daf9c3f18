"""What works under DeepSpeed's ZeRO: the cells of `scripts.scaling.cells`, with ZeRO as the engine."""

import tempfile
from importlib import metadata
from pathlib import Path

import torch

from plugins.distributed.tests.zero_training import ZeroJob, trained
from scripts.scaling.cells import STOPS, print_head, row
from scripts.scaling.jobs import METHODS, alone
from tests.support import together

# The stage, and whether the base is partitioned from the start.
ENGINES = {"ZeRO-1": (1, False), "ZeRO-2": (2, False), "ZeRO-3": (3, False), "ZeRO-3, base in zero.Init": (3, True)}


def main(processes: int = 2) -> None:
    """Print one row for each engine and method."""
    torch.set_num_threads(1)
    jobs = {
        f"{engine}, {method}, {stop}": ZeroJob(stage, *METHODS[method], stop=stop, init=init)
        for engine, (stage, init) in ENGINES.items()
        for method in METHODS
        for stop in (0, *STOPS)
    }
    with tempfile.TemporaryDirectory() as folder:
        found = trained(jobs, Path(folder), processes=processes)
        ones = {method: together.train(alone("zero", method), Path(folder) / "alone") for method in METHODS}
        print_head(f"torch {torch.__version__}, DeepSpeed {metadata.version('deepspeed')}", processes)
        for engine in ENGINES:
            for method, one in ones.items():
                whole, *stopped = ([each[f"{engine}, {method}, {stop}"] for each in found] for stop in (0, *STOPS))
                print(f"| {engine} | {method} | {' | '.join(row(one, whole, stopped))} |", flush=True)
