"""The default targets of architectures: every matrix of the blocks and nothing else."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
from torch import nn

from tests.support import target_models
from tests.support.model_checks import silent
from tunerkit import targets
from tunerkit.errors import TargetError, TunerkitWarning
from tunerkit.patterns import matches
from tunerkit_transformers.default_targets import DEFAULT_TARGETS

chosen = partial(target_models.chosen, defaults=DEFAULT_TARGETS)
DEFAULTS = {model_type: known.names for known in DEFAULT_TARGETS for model_type in known.model_types}

TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

DECODER = {**TINY, "num_key_value_heads": 1, "head_dim": 8}

IMAGE = {key: TINY[key] for key in list(TINY)[1:5]} | {"image_size": 32, "patch_size": 16}

GPT = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}

T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}

BART = {"vocab_size": 32, "d_model": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | {
    f"{side}_{size}": value
    for side in ("encoder", "decoder")
    for size, value in {"layers": 2, "ffn_dim": 32, "attention_heads": 2}.items()
}

DISENTANGLED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}

SPEECH = {"conv_dim": [8], "conv_stride": [2], "conv_kernel": [3], "num_feat_extract_layers": 1} | {
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}

LLAMAS = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Phi3", "Granite", "Cohere"]

LLAMAS += ["Olmo", "Olmo2", "SmolLM3", "StableLm"]

ARCHITECTURES: list[tuple[str, str, Mapping[str, object]]] = [
    ("BertForSequenceClassification", "BertConfig", {**TINY}),
    ("BertForMaskedLM", "BertConfig", {**TINY}),
    ("RobertaForSequenceClassification", "RobertaConfig", {**TINY}),
    ("ElectraForSequenceClassification", "ElectraConfig", {**TINY, "embedding_size": 8}),
    ("DebertaV2ForSequenceClassification", "DebertaV2Config", TINY | DISENTANGLED),
    (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": 32, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2},
    ),
    ("AlbertForMaskedLM", "AlbertConfig", {**TINY, "embedding_size": 8}),
    ("MPNetForSequenceClassification", "MPNetConfig", {**TINY}),
    ("ModernBertForSequenceClassification", "ModernBertConfig", {**TINY, "cls_token_id": 1, "sep_token_id": 2}),
    ("GPT2LMHeadModel", "GPT2Config", {**GPT}),
    ("GPT2LMHeadModel", "GPT2Config", {**GPT, "add_cross_attention": True}),
    ("GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 4}),
    ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**TINY}),
    (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {**TINY, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    ),
    ("BloomForCausalLM", "BloomConfig", {"vocab_size": 32, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
    ("FalconForCausalLM", "FalconConfig", {**TINY}),
    ("OPTForCausalLM", "OPTConfig", {**TINY, "ffn_dim": 32, "word_embed_proj_dim": 8}),
    ("PhiForCausalLM", "PhiConfig", {**TINY}),
    *[(f"{name}ForCausalLM", f"{name}Config", DECODER) for name in LLAMAS],
    ("Gemma3ForCausalLM", "Gemma3TextConfig", {**DECODER}),
    ("T5ForConditionalGeneration", "T5Config", {**T5}),
    ("MT5ForConditionalGeneration", "MT5Config", {**T5, "feed_forward_proj": "gated-gelu"}),
    ("UMT5ForConditionalGeneration", "UMT5Config", {**T5}),
    ("BartForSequenceClassification", "BartConfig", {**BART}),
    ("WhisperForConditionalGeneration", "WhisperConfig", {**BART, "decoder_start_token_id": 1}),
    ("ViTForImageClassification", "ViTConfig", {**IMAGE}),
    ("DeiTForImageClassification", "DeiTConfig", {**IMAGE}),
    ("Dinov2ForImageClassification", "Dinov2Config", {**IMAGE}),
    ("CLIPModel", "CLIPConfig", {"text_config": {**TINY}, "vision_config": {**IMAGE}, "projection_dim": 8}),
    ("CLIPVisionModel", "CLIPVisionConfig", {**IMAGE}),
    ("SiglipTextModel", "SiglipTextConfig", {**TINY, "projection_size": 16}),
    ("Wav2Vec2ForCTC", "Wav2Vec2Config", TINY | SPEECH),
]


def tiny(model_class: str, config_class: str, options: Mapping[str, object]) -> Any:
    """A small random model; nothing is downloaded."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    return getattr(transformers, model_class)(getattr(transformers, config_class)(**options))


@pytest.mark.parametrize(
    ("model_class", "config_class", "options"), ARCHITECTURES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_default_of_an_architecture_is_every_matrix_of_its_blocks_and_nothing_else(
    model_class: str, config_class: str, options: Mapping[str, object]
) -> None:
    """Law: exactly the linear layers inside numbered blocks: no pooler, head or projection beside them."""
    model = tiny(model_class, config_class, options)
    assert model.config.model_type in DEFAULTS
    expected = [
        path
        for path, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and re.search(r"\.\d+\.", path)
    ]
    with silent():
        assert chosen(model, None) == expected
    assert len(expected) >= 4


def test_every_name_of_every_tested_default_matches_somewhere() -> None:
    """Law: every name of a default matches in some architecture that shares it, except older vision names."""
    by_type: dict[str, set[str]] = {}
    for model_class, config_class, options in ARCHITECTURES:
        model = tiny(model_class, config_class, options)
        used = by_type.setdefault("|".join(DEFAULTS[model.config.model_type]), set())
        used.update(
            name
            for name in DEFAULTS[model.config.model_type]
            for path, _ in model.named_modules()
            if matches(name, path)
        )
    unused = {name for key, used in by_type.items() for name in key.split("|") if name not in used}
    assert unused <= {*DEFAULTS["bert"]}


@pytest.mark.parametrize("name", ["Qwen3Moe", "Mixtral"])
def test_a_mixture_of_experts_gets_its_attention_and_a_warning_about_experts_and_routers(name: str) -> None:
    """Law: an architecture without a default gets all-linear; experts and routers are not layers, and are reported."""
    experts = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    model = tiny(f"{name}ForCausalLM", f"{name}Config", DECODER | experts)
    with pytest.warns(TunerkitWarning) as caught:
        selected = chosen(model, None)
    assert {path.rpartition(".")[2] for path in selected} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert "experts.gate_up_proj and 1 more like it: is a stack of matrices" in str(caught[0].message)
    assert "mlp.gate and 1 more like it: is a" in str(caught[0].message)
    with pytest.raises(TargetError, match="'down_proj' is a stack of matrices in one parameter"):
        chosen(model, ["q_proj", "down_proj"])


def test_an_attention_pooling_head_triggers_a_warning() -> None:
    """Law: SigLIP's nn.MultiheadAttention is inside a head, so a default leaves it out and reports it."""
    model = tiny("SiglipVisionModel", "SiglipVisionConfig", {**IMAGE})
    with pytest.warns(TunerkitWarning, match=r"head\.attention: nn\.MultiheadAttention"):
        assert len(chosen(model, None)) == 12


def test_gpt2_with_its_tied_head_named_is_refused_with_both_names() -> None:
    """Law: the error has the full names of the modules that share the weight."""
    model = tiny("GPT2LMHeadModel", "GPT2Config", {**GPT})
    with pytest.raises(TargetError, match=r"lm_head: .*transformer\.wte\.weight, lm_head\.weight"):
        chosen(model, ["c_attn", "lm_head"])
    with pytest.raises(TargetError, match=r"lm_head\.weight is tied to transformer\.wte\.weight"):
        targets.refuse_tied(target_models.scanned(model, *DEFAULT_TARGETS), ["lm_head"])
