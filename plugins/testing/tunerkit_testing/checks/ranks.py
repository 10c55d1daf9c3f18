"""Checks of ranks and budget: what a method says of them is true."""

from collections.abc import Mapping
from pathlib import Path
from unittest import SkipTest

import torch

import tunerkit
from tunerkit import hooks, injection
from tunerkit_testing.cases import STEPS, Case, train, trained, wrapped
from tunerkit_testing.checks.probing import in_dtype, require_delta

_SMALLEST = 1e-6  # a singular value below this share of the largest is rounding: a delta may be computed in fp32


def check_rank(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """The matrix that an adapter adds has at most the rank that ``adapter.rank`` says, and its factors that many rows.

    A start that is subtracted again adds its own rank. A delta that is computed from the weight may have any rank.
    """
    require_delta(method)
    wide, settings = in_dtype(case, torch.float64), {**config, "adapter_dtype": "float64"}
    is_subtracted = hooks.registry.get(method).start == "rounding"
    starts = tunerkit.tuner(wrapped(wide, method, settings)).ranks() if is_subtracted else {}
    model = trained(wide, method, settings)
    tuner = tunerkit.tuner(model)
    if not any(tuner.ranks().values()):
        raise SkipTest("the method has no ranks: adapter.rank is 0")
    if any(adapter.reads_weight for adapter in tuner.adapters().values()):
        raise SkipTest("the delta is computed from the weight, so its rank is not the adapter's")
    for path, _, slots in injection.walk(model):
        for slot in slots.applied:
            if slot.adapter is None or slots.base is None or not slots.base.has_weight:
                continue
            rank, most = slot.adapter.rank, slot.adapter.rank + starts.get(path, 0)
            weight = hooks.delta(path, slot.method, slot.adapter, slots.base).weight
            true = 0 if weight is None else int(torch.linalg.matrix_rank(weight, rtol=_SMALLEST))
            assert true <= most, (
                f"{path}: adapter.rank is {rank}, and what the adapter adds has rank {true}; return the number of "
                "pairs of rows and columns that the product has"
            )
            rows = (
                hooks.factors(path, slot.method, slot.adapter, slots.base).rank if hooks.has_factors(method) else rank
            )
            assert rows in (rank, most), (
                f"{path}: adapter.rank is {rank}, and tunerkit_factors returns {rows} rows; let both count the live "
                "pairs of rows and columns"
            )


def check_budget(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
    """After training, the budget is the schedule's final one. If it counts ranks, the live ranks sum to it exactly."""
    model = wrapped(case, method, config)
    tuner = tunerkit.tuner(model)
    # If the budget counts something else, such as parameters, the ranks do not sum to it at the start.
    counts_ranks = sum(tuner.ranks().values()) == tuner.budget()
    train(model, case)
    now, planned = tuner.budget(), tuner.budget(STEPS)
    assert now == planned, (
        f"after the last step the budget is {now}, planned were {planned}; let tunerkit_budget(step=None) be the one "
        "in force"
    )
    if counts_ranks:
        live = sum(tuner.ranks().values())
        assert live == now, (
            f"the live ranks sum to {live}, the budget is {now}; keep exactly as many as the budget says, and let "
            "adapter.rank count those"
        )
    tuner.finish()
    assert tuner.budget() == planned, (
        f"tuner.finish() after the last step changes the budget from {planned} to {tuner.budget()}; let "
        "tunerkit_finish make the final allocation, which is in force already"
    )
    for change in tuner.history[-1:]:
        assert (change.budget, change.ranks) == (now, tuner.ranks()), (
            "the last allocation reported other ranks or another budget than are in force; return the new ranks from "
            "tunerkit_after_step in the step that changes them"
        )
