"""DeLoRA (Bini et al., ICLR 2025, arXiv 2503.18225): a low-rank product of bounded size."""

import math
from collections.abc import Iterator, Mapping
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

from tunerkit.plugin import Adapter, BaseLayer, Factors, Method, Target, add_low_rank, hookimpl, setting
from tunerkit_methods.patterned import PatternedConfig
from tunerkit_methods.sizes import at_most

NAMES = {
    "type": "DELORA",
    "tensors": {
        "a": {"name": "delora_A", "shape": ["rank", "in"]},
        "b": {"name": "delora_B", "shape": ["out", "rank"]},
        **{"bound": "delora_lambda", "norms": "delora_w_norm"},
    },
    "settings": {
        "rank": {"name": "r", "pattern": "rank_pattern"},
        **{"bound": "delora_lambda", "dropout": "module_dropout"},
    },
    "ignored": ["init_weights", "lambda_pattern"],
    "layers": ["Linear"],
    "bias": "delora_only",
}


@attrs.frozen
class Config(PatternedConfig):
    """The settings of DeLoRA."""

    rank: int = setting(8, ge=1, doc="rows of A and columns of B", aka=("r",))
    bound: float = setting(15.0, gt=0, doc="λ at the start; it is trained", aka=("delora_lambda",))
    dropout: float = setting(0.0, ge=0, lt=1, doc="share of the input that is dropped", aka=("module_dropout",))
    rank_pattern: Mapping[str, int] = setting(
        attrs.Factory(dict), ge=1, doc="maps a target pattern to a rank; the first match counts"
    )


class Bounded(Adapter):
    """ΔW = λ/r · B Ξ A diag(n), with Ξ = diag(1 / (‖bᵢ‖ ‖aᵢ‖)), B (out, r), A (r, in), and a trained λ.

    Each triplet then has a length of λ/r before diag(n), however long A and B are. The paper scales by the norm of W;
    here, as in PEFT, n (in,) has that of each of its columns, as it is at the start. B starts at 0.
    """

    reads_output: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = True  # at the start

    def __init__(self, base: BaseLayer, config: Config, path: str, *, loading: bool) -> None:
        super().__init__()
        most = max(8, min(base.out_features, base.in_features))  # 8, the default, does no harm
        rank = at_most(config.at(path, "rank"), 8, most, "rank, the rank of the weight")
        self.a = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, base.in_features), a=math.sqrt(5)))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))
        self.bound = nn.Parameter(torch.tensor([config.bound]))
        weight = torch.ones(1, base.in_features) if loading else base.dense()
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.norms = nn.Parameter(weight.to(wide).norm(dim=0).cpu(), requires_grad=False)
        self.dropout = config.dropout

    @property
    def rank(self) -> int:
        return len(self.a)

    def product(self) -> Factors:
        wide = torch.promote_types(self.b.dtype, torch.float32)
        a, b = self.a.to(wide), self.b.to(wide)
        # A column of length 0 has no direction; PEFT has the same limit. Squared, it would be 0 in fp16.
        lengths = a.norm(dim=1).clamp(min=1e-4) * b.norm(dim=0).clamp(min=1e-4)
        return Factors(q=self.a * self.norms, p=(b * (self.bound / self.rank / lengths)).to(self.b.dtype))

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        product = self.product()
        dropout = self.dropout if self.training else 0.0
        return add_low_rank(base, x, y, q=product.q, p=product.p, scale=1.0, dropout=dropout)


@hookimpl
def tunerkit_methods() -> Iterator[Method]:
    yield Method("delora", config=Config, foreign={"peft": NAMES})


@hookimpl
def tunerkit_build_adapter(target: Target, base: BaseLayer, config: Config, loading: bool) -> Bounded:
    return Bounded(base, config, target.path, loading=loading)


@hookimpl
def tunerkit_factors(adapter: Bounded) -> Factors:
    return adapter.product()
