"""Conformance cases: small random models whose attention uses weights directly, bypassing the layer's forward()."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import remove_parametrizations
from transformers import WavLMConfig, WavLMForSequenceClassification

from tunerkit_testing.cases import Case

_CLASSES = torch.tensor([0, 1, 1, 0])


class Encoder(nn.Module):
    """Maps (N, L, 16) to two logits: torch's encoder, the mean over time, a classifier."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        # An activation that torch's fused layer does not support. Wrapped layers cannot use the fused layer, and the
        # checks compare outputs bit for bit.
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, activation=F.silu, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.classifier = nn.Linear(16, 2)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(x if self.batch_first else x.transpose(0, 1))
        result: Tensor = self.classifier(h.mean(1 if self.batch_first else 0))
        return result


def batch_first() -> nn.Module:
    """An encoder with input (N, L, E)."""
    torch.manual_seed(0)
    return Encoder(batch_first=True)


def sequence_first() -> nn.Module:
    """An encoder with input (L, N, E)."""
    torch.manual_seed(0)
    return Encoder(batch_first=False)


def wavlm() -> nn.Module:
    """A speech classifier with two layers, whose attention uses the weights of its four projections directly."""
    torch.manual_seed(0)
    model = WavLMForSequenceClassification(
        WavLMConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            conv_dim=(8, 8),
            conv_stride=(5, 4),
            conv_kernel=(10, 8),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            num_buckets=8,
            max_bucket_distance=16,
            classifier_proj_size=8,
            hidden_dropout=0.0,
            activation_dropout=0.0,
            attention_dropout=0.0,
            feat_proj_dropout=0.0,
            final_dropout=0.0,
            layerdrop=0.0,
            apply_spec_augment=False,
        )
    )
    # Each parametrized module gets its own class, and the checks compare types across models.
    remove_parametrizations(model.wavlm.encoder.pos_conv_embed.conv, "weight")
    return model


def _features() -> Tensor:
    return torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(1))


def _sound() -> dict[str, Any]:
    return {"input_values": torch.randn(4, 400, generator=torch.Generator().manual_seed(1))}


def _encoded(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(_features())
    return found


def _encoder_loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(_features()), _CLASSES)


def _heard(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**_sound()).logits
    return found


def _sound_loss(model: nn.Module) -> Tensor:
    found: Tensor = model(**_sound(), labels=_CLASSES).loss
    return found


CASES: tuple[Case, ...] = (
    Case("encoder", batch_first, _encoded, _encoder_loss),
    Case("sequence-first", sequence_first, _encoded, _encoder_loss),
    Case("wavlm", wavlm, _heard, _sound_loss),
)
