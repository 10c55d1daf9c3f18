"""AdaLoRA with one thing changed at a time, at LoRA's best learning rate."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.quality import methods
from benchmarks.quality.runs import Run
from benchmarks.quality.scores import Floats, best, interval, paired
from benchmarks.quality.store import Row

RANK = 1
SEEDS = (0, 1, 2, 3)
# Written out, so that a row says what was run even after a default has moved.
BASE: Mapping[str, Any] = {
    "start": "lora",
    "init_rank": 2,
    "alpha": 4.0,
    "t_init": 0.1,
    "t_final": 0.3,
    "delta_t": 10,
    "beta1": 0.85,
    "beta2": 0.85,
    "gamma": 0.0,
}
_FOUR = {"init_rank": 4, "alpha": 8.0}
_EIGHT = {"init_rank": 8, "alpha": 16.0}
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "nothing": {},
    # How much there is to choose from; the scale stays 2.
    "init_rank 3": {"init_rank": 3, "alpha": 6.0},
    "init_rank 4": _FOUR,
    "init_rank 8": _EIGHT,
    # When triplets go.
    "t_init 0": {"t_init": 0.0},
    "t_init 0.3": {"t_init": 0.3},
    "t_final 0.1": {"t_final": 0.1},
    "t_final 0.5": {"t_final": 0.5},
    "t_final 0.7": {"t_final": 0.7},
    "delta_t 1": {"delta_t": 1},
    "delta_t 30": {"delta_t": 30},
    # By what they go.
    "beta1 and beta2 0.5": {"beta1": 0.5, "beta2": 0.5},
    "beta1 and beta2 0.95": {"beta1": 0.95, "beta2": 0.95},
    "score without uncertainty": {methods.EXPERIMENT: {"score": "sensitivity"}},
    "score exact for the triplet": {methods.EXPERIMENT: {"score": "exact"}},
    "score by size": {methods.EXPERIMENT: {"score": "magnitude"}},
    "score per parameter": {methods.EXPERIMENT: {"per_parameter": True}},
    "turned before, score by size": {methods.EXPERIMENT: {"rotate": "before", "score": "magnitude"}},
    "turned after": {methods.EXPERIMENT: {"rotate": "after"}},
    # More to choose from and turned, so that what is worth most in a layer lies in few triplets.
    "init_rank 4, turned after": {**_FOUR, methods.EXPERIMENT: {"rotate": "after"}},
    "init_rank 8, turned after": {**_EIGHT, methods.EXPERIMENT: {"rotate": "after"}},
    "init_rank 8, turned before, score by size": {
        **_EIGHT,
        methods.EXPERIMENT: {"rotate": "before", "score": "magnitude"},
    },
    "init_rank 4, turned after, score exact": {**_FOUR, methods.EXPERIMENT: {"rotate": "after", "score": "exact"}},
    "init_rank 8, turned after, score exact": {**_EIGHT, methods.EXPERIMENT: {"rotate": "after", "score": "exact"}},
    "init_rank 4, turned after, score squared per parameter": {
        **_FOUR,
        methods.EXPERIMENT: {"rotate": "after", "score": "squared", "per_parameter": True},
    },
    # Where they start and how they move.
    "start gaussian": {"start": "gaussian"},
    "start orthonormal": {"start": "orthonormal"},
    "gamma 0.1": {"gamma": 0.1},
    "gamma 0.5": {"gamma": 0.5},
    "scale 1": {"alpha": 2.0},
    "scale 4": {"alpha": 8.0},
    "lambda still": {methods.EXPERIMENT: {"lambda_rate": 0.0}},
    "lambda ten times as fast": {methods.EXPERIMENT: {"lambda_rate": 10.0}},
}


def settings_of(change: str) -> dict[str, Any]:
    """What AdaLoRA is given for a change."""
    return {**BASE, **CHANGES[change]}


def ablation(rates: Mapping[str, float]) -> list[Run]:
    """LoRA and every change on each task, at its rate in ``rates``; all with the first seed, then with the next."""
    runs = []
    for seed, (task, rate) in itertools.product(SEEDS, rates.items()):
        runs.append(Run(task, methods.LORA, RANK, rate, seed))
        runs += [Run(task, methods.ADALORA, RANK, rate, seed, settings_of(change)) for change in CHANGES]
    return runs


def ablation_table(rows: Sequence[Row]) -> list[str]:
    """Points over LoRA at the same task, rate and seed: by task, and their mean with its interval; the best first."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines = [f"| changed | {' | '.join(tasks)} | mean |", f"|---|{'---:|' * (len(tasks) + 1)}"]
    found: list[tuple[float, str]] = []
    for change in CHANGES:
        differences = [each for task in tasks if len(each := over_lora(rows, task, change))]
        if differences and len(differences) == len(tasks):
            mean, low, high = interval(differences)
            shown = [f"{each.mean():+.2f} ({len(each)})" for each in differences]
            found.append((mean, f"| {change} | {' | '.join(shown)} | {mean:+.2f} [{low:+.2f}, {high:+.2f}] |"))
    return lines + [line for _, line in sorted(found, key=lambda each: -each[0])]


def over_lora(rows: Sequence[Row], task: str, change: str) -> Floats:
    """A change's differences to LoRA on one task, by the seeds that both have."""
    own = [row for row in rows if row["task"] == task]
    theirs = [row for row in own if row["method"] == methods.LORA]
    ours = [row for row in own if row["method"] == methods.ADALORA and row["settings"] == settings_of(change)]
    return paired(best(ours), best(theirs)) if ours and theirs else np.empty(0)
