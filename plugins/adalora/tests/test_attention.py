"""The method passes the conformance tests if attention uses weights directly, bypassing their modules' forward()."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import tunerkit
from tests.support.each_check import each_check
from tunerkit_testing import conformance
from tunerkit_testing.conformance import Case, Check

pytest.importorskip("transformers", reason="one of the cases is a transformers model")
from tests.support.attention_cases import CASES  # after the skip

CONFIGS: dict[str, dict[str, object]] = {
    "defaults": {"target_rank": 2, "delta_t": 2},
    "regularised": {"target_rank": 2, "delta_t": 1, "start": "gaussian", "gamma": 0.1, "alpha": 48, "bias": "adapters"},
}
ATTENTION = "re:.*(self_attn|out_proj|[qkv]_proj)"


@each_check(CASES, CONFIGS)
def test_keeps_the_contract(check: Check, case: Case, config: Mapping[str, object], tmp_path: Path) -> None:
    """Every conformance test passes for torch's encoders and for WavLM."""
    check(case, "adalora", config, tmp_path)


@pytest.mark.parametrize("case", CASES, ids=conformance.name_of)
def test_prunes_attention_to_the_exact_budget(case: Case) -> None:
    """With adapters only inside attention, every triplet is scored, the budget is exact, and dead λ are 0."""
    config = {"targets": ATTENTION, "budget": 7, "init_rank": 4, "delta_t": 2, "t_init": 2, "t_final": 4}
    model = tunerkit.wrap(case.build(), "adalora", config, seed=0).train()
    tuner = tunerkit.tuner(model)
    before = {path: adapter.rank for path, adapter in tuner.adapters().items()}
    conformance.train(model, case)
    ranks = tuner.ranks()
    assert set(before.values()) == {4}
    assert sum(ranks.values()) == tuner.budget() == 7
    assert len(set(ranks.values())) > 1
    for path, adapter in tuner.adapters().items():
        assert int((adapter.get_parameter("lam") != 0).sum()) == ranks[path]


def test_what_attention_averages_is_what_a_linear_layer_would() -> None:
    """Scores depend on gradients: those of W + ΔW in attention equal those of an SVD layer at a called layer."""
    torch.manual_seed(0)
    attention, linear = torch.nn.MultiheadAttention(8, 2).double(), torch.nn.Linear(8, 24).double()
    with torch.no_grad():
        linear.weight.copy_(attention.in_proj_weight)
        linear.bias.copy_(attention.in_proj_bias)
    config = {"target_rank": 3, "init_rank": 3, "start": "gaussian", "adapter_dtype": "float64"}
    one = tunerkit.wrap(torch.nn.ModuleDict({"x": attention}), "adalora", {**config, "targets": ["x"]}, seed=0)
    two = tunerkit.wrap(torch.nn.ModuleDict({"x": linear}), "adalora", {**config, "targets": ["x"]}, seed=0)
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    layers = [next(iter(tunerkit.tuner(model).adapters().values())) for model in (one, two)]
    for layer in layers:
        torch.nn.init.normal_(layer.get_parameter("lam"), generator=torch.Generator().manual_seed(1))
    attention(x, x, x)[0].square().sum().backward()
    q, k, v = (part.unflatten(-1, (2, 4)).permute(1, 2, 0, 3) for part in linear(x).chunk(3, -1))
    mixed = torch.softmax(q @ k.mT / 2, -1) @ v
    attention.out_proj(mixed.permute(2, 0, 1, 3).flatten(2)).square().sum().backward()
    for name in ("p", "lam", "q"):
        found, expected = (layer.get_parameter(name).grad for layer in layers)
        assert found is not None
        assert expected is not None
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)
