"""The method keeps core's contract in other libraries' models that read weights past their modules' forward."""

import warnings
from pathlib import Path

import pytest
import torch

import tunerkit
from tunerkit.testing import conformance
from tunerkit.testing.reader_cases import cases

CONFIG: dict[str, object] = {"target_rank": 2, "delta_t": 2, "gamma": 0.1, "bias": "adapters"}


@pytest.mark.parametrize("check", conformance.CHECKS, ids=conformance.name_of)
@pytest.mark.parametrize("case", cases())
def test_keeps_the_contract(check: conformance.Check, case: conformance.Case, tmp_path: Path) -> None:
    """Every check of the conformance kit holds: outputs, gradients, budgets, files, merging."""
    check(case, "adalora", CONFIG, tmp_path)


@pytest.mark.parametrize("case", cases())
def test_every_adapter_is_trained(case: conformance.Case) -> None:
    """Each P, where the default start is 0, and each λ of a Gaussian start has a gradient; nothing is left to tell."""
    for start, name in (("lora", "p"), ("gaussian", "lam")):
        model = tunerkit.wrap(case.build(), "adalora", {**case.settings, "target_rank": 2, "start": start}, seed=0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            case.loss(model).backward()
        for path, adapter in tunerkit.tuner(model).adapters().items():
            gradient = adapter.get_parameter(name).grad
            assert gradient is not None, path
            assert torch.count_nonzero(gradient), path
