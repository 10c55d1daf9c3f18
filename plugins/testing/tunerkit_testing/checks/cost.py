"""Checks of a step's cost, in operations that torch dispatches."""

from collections.abc import Mapping
from pathlib import Path
from unittest import SkipTest

import torch

import tunerkit
from tunerkit.errors import TargetError
from tunerkit_testing.cases import Advice, Case
from tunerkit_testing.checks.probing import trained_parameters, without_copies
from tunerkit_testing.counting import Counting

_BASELINE = "lora"
_TIMES = 5  # as many operations as the baseline may a step have; a loop over layers in a hook has more
_WARM = 2


def check_operations(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> str:
    """A training step dispatches at most 5 times the operations of plain LoRA at the same targets. This is advice."""
    if _BASELINE not in tunerkit.methods():
        raise SkipTest(f"method {_BASELINE!r} is not installed, which this is compared with")
    placing = {
        name: value for name, value in {**case.settings, **config}.items() if name in ("targets", "exclude", "layers")
    }
    try:
        plain = _operations(case, _BASELINE, placing)
    except TargetError as error:
        raise SkipTest(f"LoRA, which this is compared with, cannot adapt these targets: {error}") from error
    own = _operations(case, method, config)
    times = f"{own} operations per step, {own / plain:.2f} times LoRA's"
    if own > _TIMES * plain:
        raise Advice(
            f"{times}; where they are small, a step takes that much longer. Use torch._foreach_ functions on all "
            "adapters at once in step hooks, add_low_rank in forward, and one batched operation instead of a loop. A "
            "method that needs them may leave it at that"
        )
    return times


def _operations(case: Case, method: str, config: Mapping[str, object]) -> int:
    model = without_copies(case, method, config)
    optimizer = torch.optim.AdamW(trained_parameters(tunerkit.tuner(model)).values(), lr=case.lr, foreach=True)
    tunerkit.attach(model, optimizer, total_steps=10 * _WARM)

    def step() -> None:
        case.loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(_WARM):
        step()
    with Counting() as counting:
        step()
    return counting.count
