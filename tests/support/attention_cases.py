"""Conformance cases: small random models whose attention uses weights directly, bypassing the layer's forward()."""

from functools import partial
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


def encoder(*, batch_first: bool) -> nn.Module:
    """An encoder with input (N, L, E) or (L, N, E)."""
    torch.manual_seed(0)
    return Encoder(batch_first=batch_first)


_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_MORE = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "num_buckets": 8, "classifier_proj_size": 8}
_LAYERS = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "max_bucket_distance": 16}
_DROPPED = (*(f"{name}_dropout" for name in ("hidden", "activation", "attention", "feat_proj", "final")), "layerdrop")


def wavlm() -> nn.Module:
    """A speech classifier with two layers, whose attention uses the weights of its four projections directly."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {**_SIZES, **_MORE, **_LAYERS, **dict.fromkeys(_DROPPED, 0.0)}
    model = WavLMForSequenceClassification(WavLMConfig(apply_spec_augment=False, **settings))
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
    Case("encoder", partial(encoder, batch_first=True), _encoded, _encoder_loss),
    Case("sequence-first", partial(encoder, batch_first=False), _encoded, _encoder_loss),
    Case("wavlm", wavlm, _heard, _sound_loss),
)
