"""Resuming a Trainer with AdaLoRA before, during and after pruning and shrinking, bit for bit."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the Trainer is transformers'")
pytest.importorskip("accelerate", reason="the Trainer needs it")
from tunerkit_testing import resuming

# Of 30 steps: none is pruned to step 5; allocations at 6, 9, ..., 18, where the ranks are final and memory shrinks.
CONFIG: dict[str, Any] = {
    "target_rank": 2, "init_rank": 4, "t_init": 5, "t_final": 12, "delta_t": 3, "gamma": 0.1,
    "train_modules": ["classifier"],
}  # fmt: skip
# The same in 14 steps: none is pruned to step 2; allocations at 4, 6, 8 and 10, where the ranks are final.
STEPS = 14
SHORT = {**CONFIG, "t_init": 2, "t_final": 4, "delta_t": 2}


@pytest.mark.parametrize("accumulation", [1, 3])
def test_stopped_after_every_step_and_resumed_the_end_is_bit_identical(accumulation: int, tmp_path: Path) -> None:
    """Weights, masks, averages, optimizer state, history and random state, after 14 stops in 14 processes."""
    run = resuming.Run("adalora", SHORT, tmp_path, steps=STEPS, accumulation=accumulation)
    resuming.check_stopped_after_every_step(run)
    end = resuming.end_of(tmp_path / "parts")
    assert [change[0] for change in end["history"]] == [4, 6, 8, 10]
    assert end["values"]["shrunk"] is True
    assert sum(end["history"][-1][2].values()) == 2 * len(end["history"][-1][2])


@pytest.mark.parametrize("accumulation", [1, 3])
def test_killed_and_resumed_the_end_is_bit_identical(accumulation: int, tmp_path: Path) -> None:
    """Kill -9 before, during and after pruning: steps since the last checkpoint are repeated identically."""
    run = resuming.Run("adalora", CONFIG, tmp_path, accumulation=accumulation, save_steps=2)
    resuming.check_killed(run, at=(3, 8, 13, 18, 25))
    assert resuming.end_of(tmp_path / "parts")["values"]["shrunk"] is True


@pytest.mark.parametrize("best", [2, 6, 12], ids=["before pruning", "while pruning", "shrunk"])
def test_the_best_model_after_stops_is_the_best_model_without(best: int, tmp_path: Path) -> None:
    """`load_best_model_at_end` in each of 14 processes: the last one ends with the best step's ranks, bit for bit."""
    resuming.check_stopped_after_every_step(resuming.Run("adalora", SHORT, tmp_path, steps=STEPS, best=best))
    end = resuming.end_of(tmp_path / "parts")
    assert end["steps"] == (best, STEPS)
    assert end["values"]["last_step"] == best
    assert end["values"]["shrunk"] is (best >= 10)
