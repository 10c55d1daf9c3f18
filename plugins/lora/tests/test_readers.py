"""The method passes the conformance tests in models of other libraries that bypass their modules' forward()."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import tunerkit
from tests.support.each_check import each_check
from tests.support.gradients import check_reach_every_adapter
from tests.support.reader_cases import cases
from tunerkit_testing.conformance import Case, Check

CONFIGS: dict[str, dict[str, object]] = {
    "plain": {"rank": 3},
    "fp64": {"rank": 2, "bias": "adapters", "adapter_dtype": "float64"},
}


@each_check(cases(), CONFIGS)
def test_keeps_the_contract(check: Check, case: Case, config: Mapping[str, object], tmp_path: Path) -> None:
    """Every conformance test passes: outputs, gradients, files, merging."""
    check(case, "lora", config, tmp_path)


@pytest.mark.parametrize("case", cases())
def test_every_adapter_is_trained(case: Case) -> None:
    """Each B has a gradient at the start, also at all linear layers, and there is no warning."""
    for targets in (case.settings["targets"], "all-linear"):
        check_reach_every_adapter(case, "lora", {"rank": 2, "targets": targets}, "b")


def test_what_is_read_while_it_is_offloaded_is_left_out() -> None:
    """Its weight arrives too late for adding a delta; layers that are called are adapted."""
    accelerate = pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    pytest.importorskip("tunerkit_distributed", reason="it knows accelerate's hooks")
    (case,) = (parameter.values[0] for parameter in cases() if parameter.id == "mamba")
    output = case.output(case.build())
    base = accelerate.cpu_offload(case.build(), execution_device=torch.device("cpu"))
    with pytest.raises(
        tunerkit.errors.TargetError, match=r"mixer\.dt_proj and 1 more like it: is offloaded, and its weight"
    ):
        tunerkit.wrap(base, "lora", {"targets": ["dt_proj"]})
    with pytest.warns(tunerkit.TunerkitWarning, match=r"mixer\.dt_proj and 1 more like it: is offloaded"):
        model = tunerkit.wrap(base, "lora", {"targets": "all-linear"})
    assert {path.rpartition(".")[2] for path in tunerkit.tuner(model).ranks()} == {"in_proj"}
    assert torch.equal(case.output(model), output)
