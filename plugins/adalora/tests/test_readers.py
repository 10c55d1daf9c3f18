"""The method passes the conformance tests in models of other libraries that bypass their modules' forward()."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.each_check import each_check
from tests.support.gradients import check_reach_every_adapter
from tests.support.reader_cases import cases
from tunerkit_testing.conformance import Case, Check

CONFIGS: dict[str, dict[str, object]] = {
    "regularised": {"target_rank": 2, "delta_t": 2, "gamma": 0.1, "bias": "adapters"}
}


@each_check(cases(), CONFIGS)
def test_keeps_the_contract(check: Check, case: Case, config: Mapping[str, object], tmp_path: Path) -> None:
    """Every conformance test passes: outputs, gradients, budgets, files, merging."""
    check(case, "adalora", config, tmp_path)


@pytest.mark.parametrize("case", cases())
def test_every_adapter_is_trained(case: Case) -> None:
    """Each P (if it starts at 0) and each λ (of a Gaussian start) has a gradient; there is no warning."""
    for start, name in (("lora", "p"), ("gaussian", "lam")):
        check_reach_every_adapter(case, "adalora", {"target_rank": 2, "start": start}, name)
