"""Checks of ranks and budget: what a method says of them is true."""

from unittest import SkipTest

import torch
from torch import nn

import tunerkit
from tunerkit import hooks
from tunerkit_testing.blaming import told
from tunerkit_testing.cases import STEPS, Trial
from tunerkit_testing.checks.files import cut, cut_beside, rank_of
from tunerkit_testing.checks.probing import fill_, filled, placed, require_delta
from tunerkit_testing.checks.training import full_training

# A singular value below this share of the largest is rounding for the upper bound: a delta may be computed in fp32. For
# the lower bound it counts: a square matrix of random numbers, as VeRA's, has a full rank and may have a small one.
_ROUNDING = 1e-6
_SMALLEST = 1e-10


def check_rank(trial: Trial) -> None:
    """What an adapter adds has the rank that ``adapter.rank`` says, moved from its start, trained, and cut to fewer.

    Where the layer's matrix is smaller, it has all of its rank. The factors have ``adapter.rank`` rows. A delta that is
    computed from the weight may have any rank.
    """
    require_delta(trial.method)
    wide = trial.in_fp64()
    start = filled(wide)
    tuner = tunerkit.tuner(start)
    if not any(tuner.ranks().values()):
        raise SkipTest("the method has no ranks: adapter.rank is 0")
    if any(adapter.reads_weight for adapter in tuner.adapters().values()):
        raise SkipTest("the delta is computed from the weight, so its rank is not the adapter's")
    _assert_true_ranks(start, "at random values")
    # A batch of few samples trains fewer directions than there are, so what is trained is moved for the lower bound.
    model = wide.trained()
    _assert_true_ranks(model, "after training", least=False)
    _assert_true_ranks(fill_(model), "after training, at random values", most=False)
    left_out: dict[str, int] = {}
    for adapter in tuner.adapters().values():
        if (rank := rank_of(adapter)) > 1:
            named = {*adapter.rank_dims, *cut_beside(adapter)}
            shapes = {name: tensor.shape for name, tensor in adapter.state_dict().items() if name not in named}
            left_out |= {name: rank for name, shape in shapes.items() if rank in shape}
            adapter.load_state_dict(cut(adapter))
    try:
        _assert_true_ranks(start, "with one of its rank_dims less")
    except Exception as error:
        if isinstance(error, AssertionError) or not left_out:
            raise
        raise AssertionError(
            f"rank_dims leaves out {' and '.join(left_out)}, of size {max(left_out.values())} as the rank: list every "
            f"tensor with a dimension of that size that follows the rank. With one of its rank_dims less: {told(error)}"
        ) from error


@torch.no_grad()
def _assert_true_ranks(model: nn.Module, when: str, *, least: bool = True, most: bool = True) -> None:
    method = tunerkit.tuner(model).method
    for path, adapter, base in placed(model):
        rank = adapter.rank
        if not base.has_weight or (weight := hooks.delta(path, method, adapter, base).weight) is None:
            continue
        true, at_most = (int(torch.linalg.matrix_rank(weight, rtol=share)) for share in (_ROUNDING, _SMALLEST))
        lower, upper = min(rank, *weight.shape) if least else 0, rank if most else at_most
        true = max(true, min(lower, at_most))  # small singular values count as far as they are wanted
        assert lower <= true <= upper, (
            f"{path}: {when}, adapter.rank is {rank}, and what the adapter adds has rank {true}; return the number "
            "of pairs of rows and columns that the product has now, and not the setting it was built with"
        )
        rows = hooks.factors(path, method, adapter, base).rank if hooks.has_factors(method) else rank
        assert rows == rank, (
            f"{path}: adapter.rank is {rank}, and tunerkit_factors returns {rows} rows; let both count the live "
            "pairs of rows and columns"
        )


def check_budget(trial: Trial) -> None:
    """After training, the budget is the schedule's final one. If it counts ranks, the live ranks sum to it exactly."""
    ended = trial.once(full_training)
    tuner = tunerkit.tuner(ended.model)
    now, planned = tuner.budget(), tuner.budget(STEPS)
    assert now == planned, (
        f"after the last step the budget is {now}, planned were {planned}; let tunerkit_budget(step=None) be the one "
        "in force"
    )
    if ended.counts_ranks:
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
    ranks = dict(tuner.ranks())
    tuner.finish()
    assert tuner.ranks() == ranks, (
        "tuner.finish() a second time changes the ranks; let tunerkit_finish return None then"
    )
    for change in tuner.history[-1:]:
        assert (change.budget, change.ranks) == (now, tuner.ranks()), (
            "the last allocation reported other ranks or another budget than are in force; return the new ranks from "
            "tunerkit_after_step in the step that changes them"
        )
