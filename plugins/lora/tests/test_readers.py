"""The method keeps core's contract in other libraries' models that read weights past their modules' forward."""

import warnings
from pathlib import Path

import pytest
import torch

import tunerkit
from tunerkit.testing import conformance
from tunerkit.testing.reader_cases import cases


@pytest.mark.parametrize("config", [{"rank": 3}, {"rank": 2, "bias": "adapters", "adapter_dtype": "float64"}])
@pytest.mark.parametrize("check", conformance.CHECKS, ids=conformance.name_of)
@pytest.mark.parametrize("case", cases())
def test_keeps_the_contract(
    check: conformance.Check, case: conformance.Case, config: dict[str, object], tmp_path: Path
) -> None:
    """Every check of the conformance kit holds: outputs, gradients, files, merging."""
    check(case, "lora", config, tmp_path)


@pytest.mark.parametrize("case", cases())
def test_every_adapter_is_trained(case: conformance.Case) -> None:
    """Each B has a gradient at the start, at all linear layers too, and nothing is left to tell."""
    for targets in (case.settings["targets"], "all-linear"):
        model = tunerkit.wrap(case.build(), "lora", {"rank": 2, "targets": targets}, seed=0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            case.loss(model).backward()
        for path, adapter in tunerkit.tuner(model).adapters().items():
            gradient = adapter.get_parameter("b").grad
            assert gradient is not None, path
            assert float(gradient.abs().max()) > 0, path


def test_what_is_read_while_it_is_offloaded_is_left_out() -> None:
    """Its weight comes after everything that a delta could be added to; the layers that are called are adapted."""
    accelerate = pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    (case,) = (parameter.values[0] for parameter in cases() if parameter.id == "mamba")
    output = case.output(case.build())
    base = accelerate.cpu_offload(case.build(), execution_device=torch.device("cpu"))
    with pytest.raises(tunerkit.TargetError, match=r"mixer\.dt_proj and 1 more like it: is offloaded, and its weight"):
        tunerkit.wrap(base, "lora", {"targets": ["dt_proj"]})
    with pytest.warns(tunerkit.TunerkitWarning, match=r"mixer\.dt_proj and 1 more like it: is offloaded"):
        model = tunerkit.wrap(base, "lora", {"targets": "all-linear"})
    assert {path.rpartition(".")[2] for path in tunerkit.tuner(model).ranks()} == {"in_proj"}
    assert torch.equal(case.output(model), output)
