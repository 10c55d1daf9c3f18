"""The phases of a training, and the flags that store a phase in a file."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn

import tunerkit
from tunerkit_adalora.phase import Phase
from tunerkit_adalora.state_values import SavedValues, flags_of
from tunerkit_adalora.training import training_of
from tunerkit_testing.small import TARGETS, net, step, train, trainable

TOTAL = 10
# Allocations at 4, 6 and 7, the last.
SETTINGS: dict[str, Any] = {"target_rank": 2, "init_rank": 4, "t_init": 3, "t_final": 3, "delta_t": 2}
WAITING, AVERAGING, RESTARTING = Phase.WAITING, Phase.AVERAGING, Phase.RESTARTING


def started(**changes: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model: nn.Module = tunerkit.wrap(net(), "adalora", {**SETTINGS, "targets": TARGETS, **changes}, seed=0)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    tunerkit.attach(model, optimizer, total_steps=TOTAL)
    return model, optimizer


def phase(model: nn.Module) -> Phase:
    return training_of(tunerkit.tuner(model)).phase


@pytest.mark.parametrize("exact_svd", [False, True])
@pytest.mark.parametrize("shrink", [False, True])
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


def test_finishing_early_leads_to_the_final_phase() -> None:
    """From averaging and from restarting alike; the final phase is never left."""
    for steps in (2, 4):
        model, optimizer = started(exact_svd=True)
        train(model, optimizer, steps)
        tunerkit.tuner(model).finish()
        assert phase(model) is Phase.FINAL_SHRUNK
        train(model, optimizer, 1)
        assert phase(model) is Phase.FINAL_SHRUNK


def test_ranks_that_nothing_prunes_need_no_mask_in_the_end() -> None:
    """The budget stays constant: there is no dead triplet to remove, and no mask to apply."""
    model, optimizer = started(init_rank=2)
    train(model, optimizer, TOTAL)
    assert phase(model) is Phase.FINAL_SHRUNK


@pytest.mark.parametrize("each", list(Phase))
def test_the_flags_of_a_file_name_each_phase(each: Phase) -> None:
    """Phases survive the round trip through flags."""
    assert values(**flags_of(each)).phase is each
    assert each.is_final == flags_of(each)["final"]


def test_every_combination_of_flags_has_one_phase() -> None:
    """Older files could have `anew` together with `final`; the final phases win."""
    for final, shrunk, blank, anew in itertools.product([False, True], repeat=4):
        found = values(final=final, shrunk=shrunk, blank=blank, anew=anew).phase
        assert found.is_final == final
        assert (found is Phase.FINAL_SHRUNK) == (final and shrunk)


def values(**flags: bool) -> SavedValues:
    numbers: dict[str, Any] = dict.fromkeys(
        ("initial", "target", "last_step", "in_force", "averaged", "seen", "left_out"), 0
    )
    return SavedValues(**numbers, **flags)
