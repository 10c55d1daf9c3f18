"""The method passes the conformance tests on small random models of every architecture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import tunerkit
from tests.support import lengths
from tests.support.each_check import each_check
from tunerkit_testing import conformance, matrix, parametrize_with_checks
from tunerkit_testing.checks import start
from tunerkit_testing.conformance import Case, Check
from tunerkit_testing.runner import BoundCheck

# No warning about any of these models, except for the batch norms that a case keeps in eval mode itself;
# and of lr_ratio, which is here for the check of param_groups: the others train with plain optimizers.
pytestmark = pytest.mark.filterwarnings(
    "error::tunerkit.TunerkitWarning",
    "ignore:.* normalization layers of the frozen base:tunerkit.TunerkitWarning",
    "ignore:adapter .* has lr_ratio=4, but:tunerkit.TunerkitWarning",
)

PLAIN: dict[str, object] = {"rank": 3, "dropout": 0.1}
CONFIGS: dict[str, dict[str, object]] = {
    "biases": {"rank": 3, "bias": "adapters"},
    "fp64": {"rank": 2, "adapter_dtype": "float64"},
    "pissa": {"rank": 2, "start": "pissa", "dropout": 0.1},
}
FITTED: dict[str, dict[str, object]] = {
    "eva": {"rank": 2, "start": "eva", "lr_ratio": 4.0},
    "gradients": {"rank": 2, "start": "gradients", "rho": 2.0},
}


@parametrize_with_checks("lora", PLAIN, lengths.by_length())
def test_passes_every_check_of_the_kit(check: BoundCheck) -> None:
    """No failure is expected, with dropout too."""
    check()


@each_check(matrix.cases(), {"default": PLAIN})
def test_keeps_the_contract(check: Check, case: Case, config: Mapping[str, object], tmp_path: Path) -> None:
    """Every conformance test passes for every architecture."""
    check(case, "lora", config, tmp_path)


@each_check(lengths.few(), CONFIGS)
def test_keeps_the_contract_in_every_setting(
    check: Check, case: Case, config: Mapping[str, object], tmp_path: Path
) -> None:
    """Every test passes for every kind of base layer and setting."""
    check(case, "lora", config, tmp_path)


@each_check(lengths.few()[:1], FITTED)
def test_keeps_the_contract_with_a_start_by_data(
    check: Check, case: Case, config: Mapping[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every test passes if each adapter is calibrated before it is attached."""
    attach = tunerkit.attach

    def calibrated(model: nn.Module, optimizer: object, **arguments: Any) -> None:
        progress = tunerkit.tuner(model).progress
        if not progress.loaded and progress.calibration is None:
            tunerkit.calibrate(model, [start.batch_of(model, case)] * 2, loss=start.loss_of)
        attach(model, optimizer, **arguments)

    monkeypatch.setattr(tunerkit, "attach", calibrated)
    check(case, "lora", config, tmp_path)


@pytest.mark.parametrize("case", matrix.cases())
def test_default_targets_serve_every_architecture(case: Case, tmp_path: Path) -> None:
    """Even if a case names targets, the default finds some too, and they merge."""
    conformance.check_merges_and_unmerges(case, "lora", {"rank": 2, "targets": None}, tmp_path)


@pytest.mark.parametrize("case", lengths.linear())
def test_all_linear_serves_every_architecture(case: Case, tmp_path: Path) -> None:
    """In encoders, decoders and towers, all linear layers merge."""
    conformance.check_merges_and_unmerges(case, "lora", {"rank": 2, "targets": "all-linear"}, tmp_path)
