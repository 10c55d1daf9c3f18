"""AdaLoRA with one thing changed at a time, or a few together, at LoRA's best learning rate."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.quality import methods
from benchmarks.quality.runs import Run
from benchmarks.quality.scores import points_of, told
from benchmarks.quality.store import Row


def _with(settings: Mapping[str, Any], **experiment: Any) -> dict[str, Any]:
    return {**settings, methods.EXPERIMENT: {**settings.get(methods.EXPERIMENT, {}), **experiment}}


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
_FOUR_EVEN = {"init_rank": 4, "alpha": 2.0, methods.EXPERIMENT: {"even": True}}
_EIGHT_EVEN = {"init_rank": 8, "alpha": 2.0, methods.EXPERIMENT: {"even": True}}
_BY_SIZE = {"even": False, "rotate": "after", "power": 1.0}
_BY_ROOT = {"even": False, "rotate": "after", "power": 0.5}
_LATE = {"t_init": 0.5, "t_final": 0.2}
_ONCE = {"t_init": 0.69, "t_final": 0.3}  # one multiple of delta_t lies between, where the final phase begins
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "nothing": {},
    # How much there is to choose from; the scale stays 2.
    "init_rank 3": {"init_rank": 3, "alpha": 6.0},
    "init_rank 4": _FOUR,
    "init_rank 8": _EIGHT,
    # The same, but all triplets together move a layer in a step as far as one does: alpha is of the rank there is.
    "init_rank 2, even": {"alpha": 2.0, methods.EXPERIMENT: {"even": True}},
    "init_rank 4, even": _FOUR_EVEN,
    "init_rank 8, even": _EIGHT_EVEN,
    "init_rank 4, even, turned after": _with(_FOUR_EVEN, rotate="after"),
    "init_rank 8, even, turned after": _with(_EIGHT_EVEN, rotate="after"),
    "init_rank 8, even, turned before, score by size": _with(_EIGHT_EVEN, rotate="before", score="magnitude"),
    # Turned into the form of an SVD: λ goes by the singular values, so that large triplets take the longer steps.
    "init_rank 4, turned after, lambda by size": _with(_FOUR_EVEN, **_BY_SIZE),
    "init_rank 8, turned after, lambda by size": _with(_EIGHT_EVEN, **_BY_SIZE),
    "init_rank 8, turned after, lambda by its root": _with(_EIGHT_EVEN, **_BY_ROOT),
    "init_rank 8, turned after, lambda by size, early": {
        **_with(_EIGHT_EVEN, **_BY_SIZE),
        "t_init": 0.03,
        "t_final": 0.5,
    },
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
    # More to learn with for longer: triplets go late, or all at once.
    "init_rank 4, t_init 0.5, t_final 0.2": {**_FOUR, **_LATE},
    "init_rank 8, t_init 0.5, t_final 0.2": {**_EIGHT, **_LATE},
    "init_rank 8, t_init 0.5, t_final 0.2, turned after": {**_EIGHT, **_LATE, methods.EXPERIMENT: {"rotate": "after"}},
    "init_rank 8, cut once at 0.7": {**_EIGHT, **_ONCE},
    "init_rank 8, cut once at 0.7, turned before, score by size": {
        **_EIGHT,
        **_ONCE,
        methods.EXPERIMENT: {"rotate": "before", "score": "magnitude"},
    },
    # Where they start and how they move.
    "start gaussian": {"start": "gaussian"},
    "start orthonormal": {"start": "orthonormal"},
    "gamma 0.1": {"gamma": 0.1},
    "gamma 0.5": {"gamma": 0.5},
    "q orthonormal": {methods.EXPERIMENT: {"q_orthonormal": True}},
    "q half as large": {methods.EXPERIMENT: {"q_scale": 0.5}},
    "q twice as large": {methods.EXPERIMENT: {"q_scale": 2.0}},
    "q four times as large": {methods.EXPERIMENT: {"q_scale": 4.0}},
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
    """What each change makes of LoRA's accuracy and loss on validation rows; the best first.

    Points over LoRA at the same task, rate and seed: by task, and their mean with its interval. The last column is the
    loss over LoRA's, in percent of it, which scatters less from seed to seed than the accuracy of so few rows.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines = [f"| changed | {' | '.join(tasks)} | mean | loss, % |", f"|---|{'---:|' * (len(tasks) + 2)}"]
    found: list[tuple[float, str]] = []
    for change in CHANGES:
        pairs = {task: beside_lora(rows, task, change) for task in tasks}
        if pairs and all(pairs.values()):
            points = [np.array([points_of(own) - points_of(lora) for own, lora in each]) for each in pairs.values()]
            losses = [np.array([_loss_over(own, lora) for own, lora in each]) for each in pairs.values()]
            shown = [f"{each.mean():+.2f} ({len(each)})" for each in points]
            line = f"| {' | '.join([change, *shown, told(points), told(losses, digits=1)])} |"
            found.append((float(np.mean([each.mean() for each in points])), line))
    return lines + [line for _, line in sorted(found, key=lambda each: -each[0])]


def beside_lora(rows: Sequence[Row], task: str, change: str) -> list[tuple[Row, Row]]:
    """A change's rows on one task, each with LoRA's of the same seed."""
    own = [row for row in rows if row["task"] == task]
    lora = {row["seed"]: row for row in own if row["method"] == methods.LORA}
    wanted = (methods.ADALORA, settings_of(change))
    return [
        (row, lora[row["seed"]]) for row in own if (row["method"], row["settings"]) == wanted and row["seed"] in lora
    ]


def _loss_over(row: Row, other: Row) -> float:
    """Not a number where a loss is none."""
    own, theirs = (
        math.nan if each["validation"]["loss"] is None else each["validation"]["loss"] for each in (row, other)
    )
    return 100 * (own / theirs - 1)
