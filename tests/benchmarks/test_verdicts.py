"""The benchmark of a sweep's verdict: what it draws, and what it reads of a sweep."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tunerkit_cli", reason="its statistics are measured")
pytest.importorskip("scipy", reason="the statistics need it")

from benchmarks.verdicts import drawn, named, spreads


def test_a_draw_has_the_gap_that_it_is_given() -> None:
    """Rows differ in a tenth of the cases without a gap, and the mean is the gap with one."""
    generator = np.random.default_rng(0)
    for gap in (0.0, 0.03):
        found = drawn(generator, (40, 20_000), gap, 0.0)
        assert {*np.unique(found)} <= {-1.0, 0.0, 1.0}
        assert found.mean() == pytest.approx(gap, abs=0.005)
        assert np.mean(found != 0) == pytest.approx(0.1 + gap, abs=0.01)


def test_spreads_are_those_of_the_stored_rows() -> None:
    """One for each task and rank, in shares of 1."""
    found = spreads()
    assert len(found) > 10
    assert all(0 < each < 0.05 for each in found)


def test_the_best_value_of_a_sweep_is_named(tmp_path: Path) -> None:
    """It is better by far, so all draws name it."""
    for folder, share in (("01-low", 0.2), ("02-high", 0.9)):
        for seed in range(6):
            run = tmp_path / folder / f"seed-{seed}"
            run.mkdir(parents=True)
            right = (np.random.default_rng(seed).random(1200) < share).astype(float).tolist()
            (run / "scores.json").write_text(json.dumps({"choosing": right[:600], "judging": right[600:]}))
    assert named(np.random.default_rng(0), tmp_path) == ("02-high", 20)
