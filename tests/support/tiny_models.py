"""Random models of two layers for each kind of task, saved with their tokenizer or image processor."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForTokenClassification,
    RobertaTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from tests.support.tiny_classifier import SIZES, WORDS

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|> {{ m.content }} "
    "{% if m.role == 'assistant' %}</s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
SIDE = 8  # of the images, in pixels
_TOKENS: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 3}
_VOCABULARY = ("<pad>", "<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", *WORDS)


def save_tiny_llama(folder: Path, *, template: str | None = TEMPLATE) -> Path:
    """Save a random decoder whose tokens are words, and return ``folder``. ``template`` is its chat template."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(_VOCABULARY),
        **SIZES,
        num_hidden_layers=2,
        num_key_value_heads=2,
        initializer_range=0.3,  # from smaller weights no head could give likely tokens
        max_position_embeddings=64,
        **_TOKENS,
        bos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    _save_tokenizer(folder, template)
    return folder


def save_tiny_mixtral(folder: Path) -> Path:
    """Save a random mixture of four experts, with the tokens of the tiny Llama, and return ``folder``."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(_VOCABULARY),
        hidden_size=64,  # bitsandbytes on a CPU needs columns in blocks of 64
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        **_TOKENS,
        bos_token_id=2,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    _save_tokenizer(folder, TEMPLATE)
    return folder


def _save_tokenizer(folder: Path, template: str | None) -> None:
    tokenizer = _word_tokenizer(template)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 2)])
    tokenizer.save_pretrained(folder)


def save_tiny_roberta(folder: Path) -> Path:
    """Save a random classifier of tokens whose tokens are bytes, and return ``folder``."""
    torch.manual_seed(0)
    names = ("<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet()))
    sizes = {**SIZES, "num_hidden_layers": 1, "max_position_embeddings": 32}
    config = RobertaConfig(vocab_size=len(names), pad_token_id=1, **sizes)
    RobertaForTokenClassification(config).save_pretrained(folder)
    RobertaTokenizerFast(vocab={name: n for n, name in enumerate(names)}, merges=[]).save_pretrained(folder)
    return folder


def save_tiny_t5(folder: Path) -> Path:
    """Save a random encoder-decoder whose tokens are words, and return ``folder``."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = T5Config(vocab_size=len(_VOCABULARY), **sizes, **{"decoder_start_token_id": 0, **_TOKENS})
    T5ForConditionalGeneration(config).save_pretrained(folder)
    _word_tokenizer(None).save_pretrained(folder)
    return folder


def save_tiny_vit(folder: Path) -> Path:
    """Save a random classifier of images of `SIDE` x `SIDE` pixels, and return ``folder``."""
    torch.manual_seed(0)
    config = ViTConfig(**SIZES, num_hidden_layers=2, image_size=SIDE, patch_size=4)
    ViTForImageClassification(config).save_pretrained(folder)
    # Written by hand: building one needs Pillow.
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": SIDE, "width": SIDE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def _word_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(_VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = template
    return fast
