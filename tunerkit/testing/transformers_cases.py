"""Small random transformers models as conformance cases."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from tunerkit.testing.conformance import Case

_VOCABULARY = 61
_SHAPE = (4, 7)


def bert() -> nn.Module:
    """A classifier over two layers of width 16."""
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=_VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def gpt2() -> nn.Module:
    """A language model of two layers of Conv1D matrices, its head tied to the embeddings."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=_VOCABULARY,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=16,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def llama() -> nn.Module:
    """A language model of two layers with grouped keys and values."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=_VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
        )
    )


def _batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(0, _VOCABULARY, _SHAPE, generator=generator)}


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**_batch()).logits
    return found


def _language_loss(model: nn.Module) -> Tensor:
    batch = _batch()
    found: Tensor = model(**batch, labels=batch["input_ids"]).loss
    return found


def _class_loss(model: nn.Module) -> Tensor:
    found: Tensor = model(**_batch(), labels=torch.tensor([0, 1, 1, 0])).loss
    return found


CASES: tuple[Case, ...] = (
    Case("bert", bert, _logits, _class_loss),
    Case("gpt2", gpt2, _logits, _language_loss),
    Case("llama", llama, _logits, _language_loss),
)
