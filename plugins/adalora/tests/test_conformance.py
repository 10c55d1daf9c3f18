"""The method keeps core's contract on small random transformers models."""

from pathlib import Path

import pytest

from tunerkit.testing import conformance

pytest.importorskip("transformers", reason="the cases are transformers models")
from tunerkit.testing.transformers_cases import CASES  # after the skip

CONFIGS: dict[str, dict[str, object]] = {
    "defaults": {"target_rank": 2, "delta_t": 2},
    "paper": {"target_rank": 2, "delta_t": 1, "start": "gaussian", "gamma": 0.1, "orthogonality": "paper", "alpha": 48},
    "parameters": {"init_rank": 4, "budget": 900, "budget_unit": "parameters", "delta_t": 2, "bias": "adapters"},
}


@pytest.mark.parametrize("config", list(CONFIGS))
@pytest.mark.parametrize("check", conformance.CHECKS, ids=conformance.name_of)
@pytest.mark.parametrize("case", CASES, ids=conformance.name_of)
def test_keeps_the_contract(check: conformance.Check, case: conformance.Case, config: str, tmp_path: Path) -> None:
    """Every check of the conformance kit holds for every architecture and setting."""
    settings = {**CONFIGS[config]}
    if case.name == "bert":
        settings["train_modules"] = ["classifier"]
    check(case, "adalora", settings, tmp_path)
