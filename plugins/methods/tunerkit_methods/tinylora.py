"""TinyLoRA (Morris et al., 2026, arXiv 2602.04118): a few numbers move each weight between its singular vectors."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

from tunerkit.plugin import Adapter, AdapterConfig, BaseLayer, Factors, Method, Target, add_low_rank, hookimpl, setting
from tunerkit_methods.sizes import at_most

NAMES = {
    "type": "TINYLORA",
    "tensors": {
        "a": {"name": "tinylora_A", "shape": ["r", "in"]},
        "b": {"name": "tinylora_B", "shape": ["out", "r"]},
        "p": {"name": "tinylora_P", "shape": ["u", "r", "r"]},
    },
    "shared": {"v.*": "tinylora_v.*"},
    "settings": {"rank": "r", "size": "u", "tying": "weight_tying", "dropout": "tinylora_dropout"},
    "constants": {"save_projection": True},
    "ignored": ["projection_seed", "init_v_bound", "init_weights"],
    "layers": ["Linear", "Conv1D"],  # at an embedding, PEFT's matrices are the other way round
    "bias": "tinylora_only",
}


@attrs.frozen
class Config(AdapterConfig):
    """The settings of TinyLoRA."""

    rank: int = setting(2, ge=1, doc="singular triplets of each weight", aka=("r",))
    size: int = setting(64, ge=1, doc="trained numbers of each group of targets", aka=("u",))
    tying: float = setting(
        0.0, ge=0, le=1, doc="0: each target has its own numbers; 1: all share them", aka=("weight_tying",)
    )
    dropout: float = setting(0.0, ge=0, lt=1, doc="share of the input that is dropped", aka=("tinylora_dropout",))


class Numbers(nn.Module):
    """The vectors v (size,) of all groups, which start at 0, and which target is in which group."""

    def __init__(self, targets: Sequence[Target], config: Config) -> None:
        super().__init__()
        groups = max(1, round(len(targets) * (1 - config.tying)))
        each = len(targets) // groups
        self.v = nn.ParameterDict({str(group): nn.Parameter(torch.zeros(config.size)) for group in range(groups)})
        self.group_of = {target.path: str(min(at // each, groups - 1)) for at, target in enumerate(targets)}


class Tiny(Adapter):
    """ΔW = B (Σᵢ vᵢ Pᵢ) A, with B (out, r) = U √Σ and A (r, in) = √Σ Vᵀ of the SVD of W, and random P (size, r, r)."""

    reads_output: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = True  # at the start

    def __init__(self, base: BaseLayer, config: Config, group: str, *, loading: bool) -> None:
        super().__init__()
        most = min(base.out_features, base.in_features)
        rank = min(at_most(config.rank, 2, max(2, most), "rank, the rank of the weight"), most)
        self.a = nn.Parameter(torch.zeros(rank, base.in_features), requires_grad=False)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank), requires_grad=False)
        if not loading:
            u, s, vh = torch.linalg.svd(base.dense().float(), full_matrices=False)
            self.a.copy_(s[:rank, None].sqrt() * vh[:rank])
            self.b.copy_(u[:, :rank] * s[:rank].sqrt())
        self.p = nn.Parameter(torch.randn(config.size, rank, rank) / rank**0.5, requires_grad=False)
        self.group, self.dropout = group, config.dropout

    @property
    def rank(self) -> int:
        return len(self.a)

    def product(self) -> Factors:
        shared: Any = self.shared
        return Factors(q=torch.einsum("i,ijk->jk", shared.v[self.group], self.p) @ self.a, p=self.b)

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        product = self.product()
        dropout = self.dropout if self.training else 0.0
        return add_low_rank(base, x, y, q=product.q, p=product.p, scale=1.0, dropout=dropout)


@hookimpl
def tunerkit_methods() -> Iterator[Method]:
    yield Method("tinylora", config=Config, foreign={"peft": NAMES})


@hookimpl
def tunerkit_shared(targets: Sequence[Target], config: Config) -> Numbers:
    return Numbers(targets, config)


@hookimpl
def tunerkit_build_adapter(target: Target, base: BaseLayer, config: Config, shared: Numbers, loading: bool) -> Tiny:
    return Tiny(base, config, shared.group_of[target.path], loading=loading)


@hookimpl
def tunerkit_factors(adapter: Tiny) -> Factors:
    return adapter.product()
