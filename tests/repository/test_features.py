"""The table of features is true: what it says of what is trained beside adapters."""

from typing import Any

import pytest
from torch import nn

import tunerkit


@pytest.mark.parametrize("settings", [{"train_modules": ["1"]}, {"bias": "all"}], ids=["norms in full", "biases alone"])
def test_lora_of_rank_0_trains_what_is_beside_it(settings: dict[str, object]) -> None:
    """``rank_pattern={"*": 0}`` adapts nothing, so that only modules in full or biases are trained."""
    pytest.importorskip("tunerkit_lora")
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    model = tunerkit.wrap(model, "lora", {"targets": ["0", "2"], "rank_pattern": {"*": 0}, **settings})
    assert tunerkit.trainable_parameters(model).trainable == (12 if "train_modules" in settings else 6 + 6 + 2)


def test_experts_are_adapted_and_can_be_trained_in_full() -> None:
    """In a mixture of experts attention and stacks are adapted, and ``train_modules`` takes the experts as copies."""
    pytest.importorskip("tunerkit_lora")
    pytest.importorskip("tunerkit_experts")
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MixtralConfig(vocab_size=32, num_key_value_heads=2, num_local_experts=2, **sizes)
    with pytest.warns(tunerkit.TunerkitWarning, match="Router"):
        model: Any = tunerkit.wrap(transformers.MixtralForCausalLM(config), "lora")
    assert {path.split(".")[3] for path in tunerkit.tuner(model).ranks()} == {"self_attn", "mlp"}
    full: Any = tunerkit.wrap(
        transformers.MixtralForCausalLM(config), "lora", {"targets": ["q_proj"], "train_modules": ["mlp.experts"]}
    )
    assert any("experts" in name for name, p in full.named_parameters() if p.requires_grad)
