"""Resuming a Trainer with LoRA, bit for bit."""

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the Trainer is transformers'")
pytest.importorskip("accelerate", reason="the Trainer needs it")
from tunerkit_testing import resuming

CONFIG = {"rank": 2, "dropout": 0.1, "train_modules": ["classifier"]}


@pytest.mark.parametrize("accumulation", [1, 3])
def test_stopped_after_every_step_and_resumed_the_end_is_bit_identical(accumulation: int, tmp_path: Path) -> None:
    """Weights, optimizer state and random state, after 10 stops in 10 processes: no step differs from the others."""
    run = resuming.Run("lora", CONFIG, tmp_path, accumulation=accumulation, steps=10)
    resuming.check_stopped_after_every_step(run)
    assert resuming.end_of(tmp_path / "parts")["steps"] == (10, 10)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_killed_and_resumed_the_end_is_bit_identical(accumulation: int, tmp_path: Path) -> None:
    """Steps since the last checkpoint that kill -9 lost are repeated identically."""
    run = resuming.Run("lora", CONFIG, tmp_path, accumulation=accumulation, save_steps=2)
    resuming.check_killed(run, at=(3, 8, 13, 18, 25))
    assert resuming.end_of(tmp_path / "parts")["steps"] == (30, 30)
