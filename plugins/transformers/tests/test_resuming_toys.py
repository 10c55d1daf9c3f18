"""Resuming a Trainer with methods that share, grow, are fitted to data or start elsewhere, bit for bit."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.toy_growing import GrowingPlugin
from tests.support.toy_shared import SharedPlugin
from tests.support.toy_starts import FittedPlugin, PrincipalPlugin
from tunerkit_testing import resuming

RUNS: dict[str, dict[str, Any]] = {
    "toy-shared": {"plugins": (SharedPlugin,)},
    "toy-growing": {"plugins": (GrowingPlugin,), "config": {"every": 2, "max_rank": 3}},
    "toy-gradients": {"plugins": (FittedPlugin,), "calibrate": True, "config": {"train_modules": ["classifier"]}},
    "toy-principal": {"plugins": (PrincipalPlugin,)},
}


@pytest.mark.parametrize("method", RUNS)
def test_stopped_after_every_step_and_resumed_the_end_is_bit_identical(method: str, tmp_path: Path) -> None:
    """Weights, ranks, optimizer state, history and random state, after 6 stops in 6 processes."""
    options = {"config": {}, **RUNS[method]}
    run = resuming.Run(method, folder=tmp_path, steps=6, **options)
    resuming.check_stopped_after_every_step(run)
    end = resuming.end_of(tmp_path / "parts")
    assert end["steps"] == (6, 6)
    if method == "toy-growing":
        assert [change[0] for change in end["history"]] == [2, 4]
