"""The phases of a training."""

from typing import Any

import pytest
import torch
from torch import nn

import tunerkit
from plugins.adalora.tests.short_training import attached, wrapped
from tunerkit_adalora.phase import Phase
from tunerkit_adalora.training import training_of
from tunerkit_testing.small import step, train

TOTAL = 10
WAITING, AVERAGING, RESTARTING = Phase.WAITING, Phase.AVERAGING, Phase.RESTARTING


def started(**changes: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Allocations at 4, 6 and 7, the last."""
    model = wrapped(**{"t_init": 3, "t_final": 3, "delta_t": 2, "shrink": True, **changes})
    return model, attached(model, TOTAL)


def phase(model: nn.Module) -> Phase:
    return training_of(tunerkit.tuner(model)).phase


@pytest.mark.parametrize("exact_svd", [False, True], ids=["plain", "SVD form"])
@pytest.mark.parametrize("shrink", [False, True], ids=["masked", "shrunk"])
def test_a_training_goes_through_its_phases_in_order(exact_svd: bool, shrink: bool) -> None:
    """Waiting, averaging, restarting after each rotation, and one of two final phases from the last allocation on."""
    model, optimizer = started(exact_svd=exact_svd, shrink=shrink)
    seen = [phase(model)]
    for _ in range(TOTAL):
        step(model, optimizer)
        seen.append(phase(model))
    allocated = RESTARTING if exact_svd else AVERAGING
    final = Phase.FINAL_SHRUNK if shrink else Phase.FINAL_MASKED
    assert seen == [WAITING, *[AVERAGING] * 3, allocated, AVERAGING, allocated, *[final] * 4]


@pytest.mark.parametrize("steps", [2, 4], ids=["averaging", "restarting"])
def test_finishing_early_leads_to_the_final_phase(steps: int) -> None:
    """It is never left."""
    model, optimizer = started(exact_svd=True)
    train(model, optimizer, steps)
    tunerkit.tuner(model).finish()
    assert phase(model) is Phase.FINAL_SHRUNK
    train(model, optimizer, 1)
    assert phase(model) is Phase.FINAL_SHRUNK


def test_ranks_that_nothing_prunes_need_no_mask_in_the_end() -> None:
    """The budget stays constant: there is no dead triplet to remove, and no mask to apply."""
    model, optimizer = started(init_rank=2)
    losses = train(model, optimizer, TOTAL)
    assert phase(model) is Phase.FINAL_SHRUNK
    assert list(tunerkit.tuner(model).ranks().values()) == [2, 2, 2]
    assert losses[-1] < losses[0]
