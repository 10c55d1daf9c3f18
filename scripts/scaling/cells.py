"""What works with which engine: each cell is a training in several processes beside one in a single process."""

import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch

import tunerkit
from scripts.scaling.jobs import METHODS, alone, job
from tests.support import together

STOPS = (1, 5, 10)  # before, during and after pruning
HEAD = ("engine", "method", "ranks and history", "largest difference", "resumed", "loaded in one process", "merge")


def main(processes: int = 2) -> None:
    """Print one row for each engine and method."""
    torch.set_num_threads(1)
    keys = [(engine, method) for engine in together.ENGINES for method in METHODS]
    jobs = [job(engine, method, stop=stop) for engine, method in keys for stop in (0, *STOPS)]
    with tempfile.TemporaryDirectory() as folder:
        found = together.together(jobs, Path(folder), processes)
        print_head(f"torch {torch.__version__}", processes)
        for number, (engine, method) in enumerate(keys):
            whole, *stopped = found[number * (1 + len(STOPS)) :][: 1 + len(STOPS)]
            one = together.train(alone(engine, method), Path(folder) / "alone")
            print(f"| {engine} | {method} | {' | '.join(row(one, whole, stopped))} |", flush=True)


def print_head(release: str, processes: int) -> None:
    """Print what was run, and the table's head."""
    print(f"{date.today()}, tunerkit {tunerkit.__version__}, {release}, {processes} processes\n")
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")


def row(one: dict[str, Any], whole: list[dict[str, Any]], stopped: list[list[dict[str, Any]]]) -> list[str]:
    """The row of a cell, without engine and method.

    Args:
        one: The results of one process.
        whole: Those of each process of the training that never stopped.
        stopped: Those of each process of the trainings that were resumed.
    """
    first = whole[0]
    alike = all(each[key] == one[key] for each in whole for key in ("ranks", "history"))
    same = all(torch.equal(each["weights"][name], first["weights"][name]) for each in whole for name in one["weights"])
    resumed = max(_difference(first, each) for results in stopped for each in results)
    with torch.no_grad():
        loaded = tunerkit.load(together.net(), first["file"])(together.inputs())
    return [
        "equal" if alike and same else "**other**",
        f"{_difference(one, first):.1e}",
        "exact" if resumed == 0 else f"{resumed:.1e}",
        "equal" if torch.equal(loaded, first["output"]) else f"{float((loaded - first['output']).abs().max()):.1e}",
        _merge(first),
    ]


def _difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    pairs = [(one["weights"][name].float(), other["weights"][name].float()) for name in one["weights"]]
    return max(float((a - b).abs().max()) for a, b in pairs)


def _merge(result: dict[str, Any]) -> str:
    if isinstance(result["merge"], str):
        return "refused"
    merged, restored = result["merge"]
    return f"{float((merged - result['output']).abs().max()):.1e}, {'restored' if restored else '**not restored**'}"
