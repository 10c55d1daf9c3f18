"""Rows of the benchmark of quality without its runs."""

import attrs
import numpy as np

from benchmarks.quality import rates, store
from benchmarks.quality.runs import Run


def row_of(run: Run, accuracy: float, loss: float | None = 1.0) -> store.Row:
    """What a run of that accuracy leaves."""
    return {"key": run.key, **attrs.asdict(run), "validation": {"accuracy": accuracy, "loss": loss}}


def searched(asked: Run, peak: float, *, by_all_seeds: bool = False) -> list[store.Row]:
    """Every row that finds a method's learning rate, where its accuracy is highest at ``peak``."""
    found: list[store.Row] = []
    while rates.rate_of(asked, found, by_all_seeds=by_all_seeds) is None:
        wanted = rates.next_runs(asked, found, by_all_seeds=by_all_seeds)
        found += [row_of(run, 1 - abs(np.log(run.learning_rate / peak)) / 10) for run in wanted]
    return found
