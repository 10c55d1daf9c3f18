"""DoRA (Liu et al., ICML 2024, arXiv 2402.09353): LoRA that trains the length of each row of W + ΔW by itself."""

from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from tunerkit.plugin import (
    Adapter,
    BaseLayer,
    Delta,
    Method,
    Target,
    add_low_rank,
    autocast_off,
    hookimpl,
    low_rank_delta,
    setting,
)
from tunerkit_methods.inputs import wide_weight
from tunerkit_methods.patterned import PatternedConfig

NAMES = {
    "type": "LORA",
    "tensors": {
        "a": {
            "name": "lora_A.weight",
            "shape": ["rank", "in"],
            "convolution": ["rank", "*in"],
            "embedding": "lora_embedding_A",
        },
        "b": {
            "name": "lora_B.weight",
            "shape": ["out", "rank"],
            "convolution": ["out", "rank", "1*"],
            "embedding": "lora_embedding_B",
        },
        "m": {"name": ["lora_magnitude_vector", "lora_magnitude_vector.weight"], "convolution": [1, "out", "1*"]},
    },
    "settings": {
        "rank": {"name": "r", "pattern": "rank_pattern"},
        "alpha": {"name": "lora_alpha", "pattern": "alpha_pattern"},
        **{"rslora": "use_rslora", "dropout": "lora_dropout"},
    },
    "constants": {"use_dora": True},
    "layers": ["Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d", "Embedding"],
    "bias": "lora_only",
}

FAILS = {"gradients_are_true": "the norm has no gradient, as in the paper"}


@attrs.frozen
class Config(PatternedConfig):
    """The settings of DoRA."""

    rank: int = setting(8, ge=1, doc="rows of A and columns of B; may exceed the layer's sides", aka=("r",))
    alpha: float = setting(16.0, gt=0, doc="numerator of the scale", aka=("lora_alpha",))
    rslora: bool = setting(False, doc="divide alpha by the root of the rank instead of the rank", aka=("use_rslora",))
    dropout: float = setting(0.0, ge=0, lt=1, doc="share of A's input dropped in training", aka=("lora_dropout",))
    rank_pattern: Mapping[str, int] = setting(
        attrs.Factory(dict), ge=1, doc="maps a target pattern to a rank; the first match counts"
    )
    alpha_pattern: Mapping[str, float] = setting(
        attrs.Factory(dict), gt=0, doc="maps a target pattern to an alpha; the first match counts"
    )


class Dora(Adapter):
    """Replaces W by f ∘ (W + s B A), f = m / ‖W + s B A‖ (out,), the norm of each row (equation 5), s the scale.

    A (rank, in) is random, B (out, rank) starts at 0, and m (out,) as the norms of W. The norm has no gradient, as
    section 4.3 of the paper says. It is taken without B A: ‖w + s b A‖² = ‖w‖² + 2 s ⟨w Aᵀ, b⟩ + s² b A Aᵀ bᵀ. A W in
    bf16, or a quantised one, is copied to fp32 for that; one that is wide already is not.
    """

    reads_output = True
    reads_weight = True

    def __init__(self, base: BaseLayer, config: Config, path: str) -> None:
        super().__init__()
        rank = config.at(path, "rank")
        self.scale = config.at(path, "alpha") / (rank**0.5 if config.rslora else rank)
        self.dropout = config.dropout
        self.a = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, base.in_features), a=5**0.5))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))
        weight = wide_weight(base, getattr(torch, config.adapter_dtype))
        self.m = nn.Parameter(torch.linalg.vector_norm(weight, dim=1))

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def factor(self, base: BaseLayer) -> Tensor:
        """f, (out,). At the start it is 1 to the last bit, also where m is rounded to a narrow dtype."""
        with torch.no_grad(), autocast_off(self.m.device):
            weight = wide_weight(base, self.m.dtype)
            norm = torch.linalg.vector_norm(weight, dim=1)
            a, b = self.scale * self.a.to(weight.dtype), self.b.to(weight.dtype)
            added = ((2 * (weight @ a.mT) + b @ (a @ a.mT)) * b).sum(1)  # to the squared norm
            longer = (1 + added / norm.square().clamp_min(1e-24)).clamp_min(1e-12).sqrt()
            norm = norm.to(self.m.dtype).clamp_min(1e-12) * longer
        factor: Tensor = self.m / norm
        return factor

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        factor, bias = self.factor(base), base.bias()
        without = y if bias is None else y - base.shape_bias(bias)
        scaled = y + (base.shape_bias(factor - 1) * without).to(y.dtype)
        rows, dropout = factor[:, None] * self.b, self.dropout if self.training else 0.0
        return add_low_rank(base, x, scaled, q=self.a, p=rows.to(self.b.dtype), scale=self.scale, dropout=dropout)


@hookimpl
def tunerkit_methods() -> Iterator[Method]:
    foreign: dict[str, Mapping[str, Any]] = {"peft": NAMES, "testing": {"expected_failures": FAILS}}
    yield Method("dora", config=Config, multiplies=True, foreign=foreign)


@hookimpl
def tunerkit_build_adapter(target: Target, base: BaseLayer, config: Config) -> Dora:
    return Dora(base, config, target.path)


@hookimpl
def tunerkit_delta(adapter: Dora, base: BaseLayer) -> Delta:
    factor = adapter.factor(base)
    added = low_rank_delta(base, q=adapter.a, p=adapter.b, scale=adapter.scale)
    return Delta(weight=(factor - 1)[:, None] * wide_weight(base, adapter.m.dtype) + factor[:, None] * added)
