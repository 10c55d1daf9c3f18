"""The method passes the conformance tests if attention uses weights directly, bypassing their modules' forward()."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import tunerkit
from tests.support.each_check import each_check
from tests.support.gradients import check_reach_every_adapter
from tunerkit_testing import conformance
from tunerkit_testing.conformance import Case, Check

pytest.importorskip("transformers", reason="one of the cases is a transformers model")
from tests.support.attention_cases import CASES  # after the skip

CONFIGS: dict[str, dict[str, object]] = {
    "plain": {"rank": 3},
    "biases": {"rank": 3, "bias": "adapters", "train_modules": ["classifier"]},
    "attention alone": {"rank": 2, "targets": "re:.*(self_attn|out_proj|[qkv]_proj)", "adapter_dtype": "float64"},
}


@each_check(CASES, CONFIGS)
def test_keeps_the_contract(check: Check, case: Case, config: Mapping[str, object], tmp_path: Path) -> None:
    """Every conformance test passes for torch's encoders and for WavLM."""
    check(case, "lora", config, tmp_path)


@pytest.mark.parametrize("case", CASES, ids=conformance.name_of)
def test_every_adapter_in_attention_is_trained(case: Case) -> None:
    """Each B has a gradient at the start, and the detector of uncalled adapters gives no warning."""
    tuner = check_reach_every_adapter(case, "lora", CONFIGS["attention alone"], "b")
    assert len(tuner.adapters()) == {"wavlm": 8}.get(case.name, 4)


def test_a_wavlm_without_a_pattern_gets_its_default() -> None:
    """Per layer, attention's four projections and the feed-forward's two matrices; there is no warning."""
    case = CASES[-1]
    model = tunerkit.wrap(case.build(), "lora")
    names = {path.rpartition(".")[2] for path in tunerkit.tuner(model).ranks()}
    assert names == {"q_proj", "k_proj", "v_proj", "out_proj", "intermediate_dense", "output_dense"}
    assert torch.isfinite(case.loss(model))


def test_a_projection_that_wavlm_reads_is_not_trained_in_full() -> None:
    """Its copy would never be called."""
    model = CASES[-1].build()
    with pytest.raises(
        tunerkit.errors.TargetError, match=r"q_proj' is used directly, bypassing its forward\(\); name the"
    ):
        tunerkit.wrap(model, "lora", {"train_modules": ["q_proj"]})
    assert "tunerkit" not in {name for path, _ in model.named_modules() for name in path.split(".")}
