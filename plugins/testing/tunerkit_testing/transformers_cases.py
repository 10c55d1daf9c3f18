"""Conformance cases: small random transformers models, one for each family with a special feature."""

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from tunerkit_testing.cases import Case

Batch = Callable[[], dict[str, Tensor]]

_VOCABULARY = 61
_SHAPE = (4, 7)
_FRAMES = 20

# The names that most configs use for their sizes, and for dropout.
_TEXT: Mapping[str, Any] = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}
_NO_DROPOUT: Mapping[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GROUPED: Mapping[str, Any] = {**_TEXT, "num_attention_heads": 4, "num_key_value_heads": 2}
_IMAGE: Mapping[str, Any] = {
    **{name: _TEXT[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")},
    "image_size": 8,
    "patch_size": 4,
}
_CLIP_TOWERS: Mapping[str, Any] = {
    "text_config": {**_TEXT, "bos_token_id": 1, "eos_token_id": 2},
    "vision_config": _IMAGE,
}
_WHISPER_TOWERS: Mapping[str, Any] = {
    f"{tower}_{size}": value
    for tower in ("encoder", "decoder")
    for size, value in {"layers": 2, "attention_heads": 2, "ffn_dim": 24}.items()
}


def _builder(
    model: type[PreTrainedModel], config: type[PreTrainedConfig], options: Mapping[str, Any], **more: Any
) -> Callable[[], nn.Module]:
    """Return a function that builds the same model at every call."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return model(config(**options, **more))

    return build


bert = _builder(BertForSequenceClassification, BertConfig, _TEXT, **_NO_DROPOUT)
# The query and key layers also project the positions, so each of them runs twice in one forward.
deberta = _builder(
    DebertaV2ForSequenceClassification,
    DebertaV2Config,
    _TEXT,
    **_NO_DROPOUT,
    relative_attention=True,
    pos_att_type=["p2c", "c2p"],
    share_att_key=True,
    position_buckets=4,
    position_biased_input=False,
    norm_rel_ebd="layer_norm",
)
# Uses Conv1D layers, and a head tied to the embeddings.
gpt2 = _builder(
    GPT2LMHeadModel,
    GPT2Config,
    {"vocab_size": _VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16},
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
)
llama = _builder(LlamaForCausalLM, LlamaConfig, _GROUPED)
qwen3 = _builder(Qwen3ForCausalLM, Qwen3Config, _GROUPED, head_dim=8)
# Its embeddings scale their output. They are untied, so that they can be adapted.
gemma3 = _builder(
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    _GROUPED,
    head_dim=8,
    sliding_window=4,
    layer_types=["sliding_attention", "full_attention"],
    tie_word_embeddings=False,
)
t5 = _builder(
    T5ForConditionalGeneration,
    T5Config,
    {"vocab_size": _VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
    feed_forward_proj="gated-gelu",
    dropout_rate=0.0,
    decoder_start_token_id=0,
)
whisper = _builder(
    WhisperForConditionalGeneration,
    WhisperConfig,
    {"vocab_size": _VOCABULARY, "d_model": 16, "num_mel_bins": 8, **_WHISPER_TOWERS},
    max_source_positions=_FRAMES // 2,
    max_target_positions=16,
    dropout=0.0,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
)
_new_vit = _builder(ViTForImageClassification, ViTConfig, _IMAGE, **_NO_DROPOUT)


def vit() -> nn.Module:
    """ViT with a head that counts as loaded, as that of a checkpoint does; a new one would be trained in full."""
    model: Any = _new_vit()
    loaded: nn.Module = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())
    return loaded.train(model.training)


clip = _builder(CLIPModel, CLIPConfig, _CLIP_TOWERS, projection_dim=8)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _ids() -> dict[str, Tensor]:
    # From 3 on: lower ids are padding, start and end tokens.
    return {"input_ids": torch.randint(3, _VOCABULARY, _SHAPE, generator=_generator())}


def _ids_of_both() -> dict[str, Tensor]:
    return {**_ids(), "decoder_input_ids": _ids()["input_ids"].flip(1)}


def _sounds() -> dict[str, Tensor]:
    return {
        "input_features": torch.randn(_SHAPE[0], 8, _FRAMES, generator=_generator()),
        "decoder_input_ids": _ids()["input_ids"],
    }


def _images() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(_SHAPE[0], 3, 8, 8, generator=_generator())}


def _captions() -> dict[str, Tensor]:
    return {**_ids(), **_images()}


def _classes() -> dict[str, Any]:
    return {"labels": torch.tensor([0, 1, 1, 0])}


def _tokens() -> dict[str, Any]:
    return {"labels": _ids()["input_ids"]}


def _pairs() -> dict[str, Any]:
    # The loss compares the two towers, so it needs no labels.
    return {"return_loss": True}


def _case(
    name: str,
    build: Callable[[], nn.Module],
    batch: Batch,
    wanted: Callable[[], dict[str, Any]],
    *,
    shown: str = "logits",
    **settings: object,
) -> Case:
    """Build a case: the model runs on ``batch``, ``shown`` is the output compared, ``wanted`` gives the labels."""

    def output(model: nn.Module) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(**batch())[shown]
        return found

    def loss(model: nn.Module) -> Tensor:
        found: Tensor = model(**batch(), **wanted()).loss
        return found

    return Case(name, build, output, loss, settings)


CASES: tuple[Case, ...] = (
    _case("bert", bert, _ids, _classes, train_modules=("classifier",)),
    _case("deberta-v2", deberta, _ids, _classes, train_modules=("classifier",)),
    _case("gpt2", gpt2, _ids, _tokens),
    _case("llama", llama, _ids, _tokens),
    _case("qwen3", qwen3, _ids, _tokens),
    _case("gemma3", gemma3, _ids, _tokens, targets=("all-linear", "embed_tokens")),
    _case("t5", t5, _ids_of_both, _tokens),
    # At 1e-2, a bias at every target overshoots in its first steps.
    attrs.evolve(_case("whisper", whisper, _sounds, _tokens), lr=3e-3),
    _case("vit", vit, _images, _classes, targets=("all-linear", "patch_embeddings.projection")),
    _case("clip", clip, _captions, _pairs, shown="logits_per_image"),
)
