"""Checks of a step's cost, in operations that torch dispatches."""

from unittest import SkipTest

import attrs
import torch

import tunerkit
from tunerkit.errors import TargetError
from tunerkit_testing.cases import Advice, Trial
from tunerkit_testing.checks.probing import (
    trained_parameters,
    without_copies,
)
from tunerkit_testing.counting import Counting

_BASELINE = "lora"
_TIMES = 5  # as many operations as the baseline may a step have; a loop over layers in a hook has more
_WARM = 2


def check_operations(trial: Trial) -> str:
    """A training step dispatches at most 5 times the operations of plain LoRA at the same targets. This is advice."""
    if _BASELINE not in tunerkit.methods():
        raise SkipTest(f"method {_BASELINE!r} is not installed, which this is compared with")
    placing = {name: value for name, value in trial.settings.items() if name in ("targets", "exclude", "layers")}
    try:
        plain = _operations(attrs.evolve(trial, method=_BASELINE, config=placing))
    except TargetError as error:
        raise SkipTest(f"LoRA, which this is compared with, cannot adapt these targets: {error}") from error
    own = _operations(trial)
    times = f"{own} operations per step, {own / plain:.2f} times LoRA's"
    if own > _TIMES * plain:
        raise Advice(
            f"{times}; where they are small, a step takes that much longer. Use torch._foreach_ functions on all "
            "adapters at once in step hooks, add_low_rank in forward, and one batched operation instead of a loop. A "
            "method that needs them may leave it at that"
        )
    return times


def _operations(trial: Trial) -> int:
    model = without_copies(trial)
    optimizer = torch.optim.AdamW(trained_parameters(tunerkit.tuner(model)).values(), lr=trial.lr, foreach=True)
    tunerkit.attach(model, optimizer, total_steps=10 * _WARM)

    def step() -> None:
        trial.loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(_WARM):
        step()
    with Counting() as counting:
        step()
    return counting.count
