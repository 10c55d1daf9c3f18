"""What a process sends: collectives and bytes, of twelve steps and of a checkpoint, noted below torch.distributed."""

import tempfile
from pathlib import Path

from scripts.scaling.jobs import METHODS, job
from tests.support import together

HEAD = ("engine", "method", "all steps", "checkpoint")


def main() -> None:
    """Print one row for each engine and method."""
    keys = [(engine, method) for engine in together.ENGINES for method in METHODS]
    with tempfile.TemporaryDirectory() as folder:
        jobs = [job(engine, method, no_sync=engine == "plain") for engine, method in keys]
        found = together.together(jobs, Path(folder))
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for (engine, method), results in zip(keys, found, strict=True):
        parts = (_listed(*results[0][part]) for part in ("stepping", "saving"))
        print(f"| {engine} | {method} | {' | '.join(parts)} |")


def _listed(calls: dict[str, int], carried: dict[str, int]) -> str:
    return ", ".join(f"{count} {name.strip('_')} ({carried[name]:,} bytes)" for name, count in calls.items()) or "none"
