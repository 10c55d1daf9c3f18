"""AdaLoRA with one setting changed at a time, or a few together, at LoRA's best learning rate."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.quality import methods
from benchmarks.quality.runs import Run
from benchmarks.quality.scores import percent_over, points_of, told
from benchmarks.quality.store import Row


def _variant(**more: Any) -> dict[str, Any]:
    return {methods.EXPERIMENT: more}


# The SVD re-parametrisation sets λ; without it, λ must be trained.
_NOT_TURNED: Mapping[str, Any] = {"exact_svd": False, "train_lambda": True}

RANK = 1
SEEDS = (0, 1)  # every change runs with the first, those in AGAIN also with the second
# Written out: a row then states its settings even after a default has changed.
BASE: Mapping[str, Any] = {
    "start": "lora",
    "init_rank": 8,
    "alpha": 2.0,
    "t_init": 0.1,
    "t_final": 0.3,
    "delta_t": 10,
    "beta1": 0.85,
    "beta2": 0.85,
    "gamma": 0.0,
    "exact_svd": True,
    "train_lambda": False,
}
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "nothing": {},
    # How triplets are rotated at allocations. The first line has the earlier defaults, when λ was trained.
    "`exact_svd` off, init_rank 2, scale 2": {"init_rank": 2, "alpha": 4.0, **_NOT_TURNED},
    "`exact_svd` off": _NOT_TURNED,
    "`exact_svd` off, scale 2": {"alpha": 16.0, **_NOT_TURNED},
    "Adam's averages rotated too": _variant(moments=True),
    "lambda alike": _variant(power=0.0),
    "lambda by the root of the size": _variant(power=0.5),
    "lambda by the square of the size": _variant(power=2.0),
    # LoRA's alpha / √r with the current rank r: faster while there are more triplets.
    "lambda and scale by the root of the rank": {"alpha": 2.0 * 8**0.5, **_variant(root=0.5)},
    # How many triplets there are to choose from, and how large a step is.
    "init_rank 2": {"init_rank": 2},
    "init_rank 4": {"init_rank": 4},
    "init_rank 16": {"init_rank": 16},
    # AdaLoRA's default: the same number of triplets whatever their cost, hence another number of parameters.
    "budget in triplets": {"budget_unit": "rank"},
    "min_rank 1": {"min_rank": 1},
    "min_rank 1, t_final 0.7": {"min_rank": 1, "t_final": 0.7},
    "alpha 1": {"alpha": 1.0},
    "alpha 4": {"alpha": 4.0},
    "alpha 8": {"alpha": 8.0},
    # When triplets are pruned.
    "t_init 0.03": {"t_init": 0.03},
    "t_init 0.3": {"t_init": 0.3},
    "t_final 0.1": {"t_final": 0.1},
    "t_final 0.5": {"t_final": 0.5},
    "t_final 0.7": {"t_final": 0.7},
    "t_init 0.03, t_final 0.5": {"t_init": 0.03, "t_final": 0.5},
    "delta_t 5": {"delta_t": 5},
    "delta_t 30": {"delta_t": 30},
    # Which score decides what is pruned.
    "beta1 and beta2 0.5": {"beta1": 0.5, "beta2": 0.5},
    "beta1 and beta2 0.95": {"beta1": 0.95, "beta2": 0.95},
    "score without uncertainty": _variant(score="sensitivity"),
    "score exact for the triplet": _variant(score="exact"),
    "score by size": _variant(score="magnitude"),
    "score per parameter": _variant(per_parameter=True),
    "score squared per parameter": _variant(score="squared", per_parameter=True),
    # How they are initialised and regularised.
    "start gaussian": {"start": "gaussian", "train_lambda": True},
    "start orthonormal": {"start": "orthonormal", "train_lambda": True},
    "`exact_svd` off, gamma 0.1": {"gamma": 0.1, **_NOT_TURNED},
    "`exact_svd` off, gamma 0.5": {"gamma": 0.5, **_NOT_TURNED},
    "q half as large": _variant(q_scale=0.5),
    "q twice as large": _variant(q_scale=2.0),
    "q orthonormal": _variant(q_orthonormal=True),
    "lambda trained": {"train_lambda": True},
    "lambda ten times as fast": {"train_lambda": True, **_variant(lambda_rate=10.0)},
}
# The changes that were on average at least as accurate as no change, with the first seed.
AGAIN = (
    "nothing",
    "init_rank 4",
    "min_rank 1",
    "min_rank 1, t_final 0.7",
    "score without uncertainty",
    "score exact for the triplet",
)


def settings_of(change: str) -> dict[str, Any]:
    """AdaLoRA's settings for a change."""
    return {**BASE, **CHANGES[change]}


def ablation(rates: Mapping[str, float]) -> list[Run]:
    """LoRA and every change on each task, at its rate in ``rates``, with the first seed; the best with the second."""
    runs = []
    for seed, changes in zip(SEEDS, (CHANGES, AGAIN), strict=True):
        for task, rate in rates.items():
            runs.append(Run(task, methods.LORA, RANK, rate, seed))
            runs += [Run(task, methods.ADALORA, RANK, rate, seed, settings_of(change)) for change in changes]
    return runs


def ablation_table(rows: Sequence[Row]) -> list[str]:
    """The accuracy and loss of each change relative to LoRA's, on validation rows; the best first.

    Columns are points over LoRA of the same task, rate and seed, by task, and their mean with its interval. The last
    column is the validation loss relative to LoRA's, in percent. It varies less between seeds than the accuracy does.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines = [f"| changed | {' | '.join(tasks)} | mean | loss, % |", f"|---|{'---:|' * (len(tasks) + 2)}"]
    found: list[tuple[float, str]] = []
    for change in CHANGES:
        pairs = {task: beside_lora(rows, task, change) for task in tasks}
        if pairs and all(pairs.values()):
            points = [np.array([points_of(own) - points_of(lora) for own, lora in each]) for each in pairs.values()]
            losses = [
                np.array([percent_over(own["validation"]["loss"], lora["validation"]["loss"]) for own, lora in each])
                for each in pairs.values()
            ]
            shown = [f"{each.mean():+.2f} ({len(each)})" for each in points]
            line = f"| {' | '.join([change, *shown, told(points), told(losses, digits=1)])} |"
            found.append((float(np.mean([each.mean() for each in points])), line))
    return lines + [line for _, line in sorted(found, key=lambda each: -each[0])]


def beside_lora(rows: Sequence[Row], task: str, change: str) -> list[tuple[Row, Row]]:
    """A change's rows on one task, each paired with LoRA's row of the same rate and seed (the later of two)."""
    own = [row for row in rows if (row["task"], row["rank"]) == (task, RANK)]
    lora = {(row["learning_rate"], row["seed"]): row for row in own if row["method"] == methods.LORA}
    wanted = (methods.ADALORA, settings_of(change))
    return [
        (row, lora[at])
        for row in own
        if (row["method"], row["settings"]) == wanted and (at := (row["learning_rate"], row["seed"])) in lora
    ]
