"""Rows of the quality benchmark without its runs."""

import attrs
import numpy as np

from benchmarks.quality import rates, store
from benchmarks.quality.runs import Run


def row_of(run: Run, accuracy: float, loss: float | None = 1.0) -> store.Row:
    """The row of a run with that accuracy."""
    return {"key": run.key, **attrs.asdict(run), "validation": {"accuracy": accuracy, "loss": loss}}


def searched(asked: Run, peak: float, *, by_all_seeds: bool = False) -> list[store.Row]:
    """All rows of the search for a method's learning rate, with the highest accuracy at ``peak``."""
    found: list[store.Row] = []
    while rates.rate_of(asked, found, by_all_seeds=by_all_seeds) is None:
        wanted = rates.next_runs(asked, found, by_all_seeds=by_all_seeds)
        found += [row_of(run, 1 - abs(np.log(run.learning_rate / peak)) / 10) for run in wanted]
    return found
