"""LoHa (Hyeon-Woo et al., ICLR 2022, arXiv 2108.06098): the product, entry by entry, of two low-rank matrices."""

from collections.abc import Iterator, Mapping
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

from tunerkit.plugin import Adapter, BaseLayer, Delta, Method, Target, add_delta, autocast_off, hookimpl, setting
from tunerkit_methods.patterned import PatternedConfig


def of_effective(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's tensors of an "effective convolution", whose A (r, in) is a core (r, r, *kernel) times (r, channels)."""
    return {
        name: value
        for n in (1, 2)
        for name, value in (
            (f"hada_w{n}_a", theirs[f"hada_w{n}_a"].mT),
            (f"hada_w{n}_b", torch.einsum("ij...,jc->ic...", theirs[f"hada_t{n}"], theirs[f"hada_w{n}_b"]).flatten(1)),
        )
    }


NAMES = {
    "type": "LOHA",
    "tensors": {
        **{f"b{n}": {"name": f"hada_w{n}_a", "shape": ["out", "rank"]} for n in (1, 2)},
        **{f"a{n}": {"name": f"hada_w{n}_b", "shape": ["rank", "in"]} for n in (1, 2)},
    },
    "others": {"hada_t1": of_effective, "hada_t2": of_effective},
    "settings": {
        "rank": {"name": "r", "pattern": "rank_pattern"},
        "alpha": {"name": "alpha", "pattern": "alpha_pattern"},
    },
    "training": {"use_effective_conv2d": False, "rank_dropout": 0.0, "module_dropout": 0.0},
    "ignored": ["init_weights"],
    "layers": ["Linear", "Conv1d", "Conv2d"],
}


@attrs.frozen
class Config(PatternedConfig):
    """The settings of LoHa."""

    rank: int = setting(8, ge=1, doc="rank of both products; may exceed the layer's sides", aka=("r",))
    alpha: float = setting(8.0, gt=0, doc="numerator of the scale alpha / rank")
    rank_pattern: Mapping[str, int] = setting(
        attrs.Factory(dict), ge=1, doc="maps a target pattern to a rank; the first match counts"
    )
    alpha_pattern: Mapping[str, float] = setting(
        attrs.Factory(dict), gt=0, doc="maps a target pattern to an alpha; the first match counts"
    )


class Loha(Adapter):
    """ΔW = (alpha / rank) · (B₁ A₁) ∘ (B₂ A₂), with B (out, rank) and A (rank, in); B₂ starts at 0 (proposition 1).

    For a stack of E matrices, each has its own: B (E, out, rank) and A (E, rank, in).
    """

    reads_output: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = False

    def __init__(self, base: BaseLayer, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale, first = alpha / rank, base.shape[:-2]
        self.b1 = nn.Parameter(nn.init.normal_(torch.empty(*first, base.out_features, rank), std=0.1))
        self.a1 = nn.Parameter(torch.randn(*first, rank, base.in_features))
        self.b2 = nn.Parameter(torch.zeros(*first, base.out_features, rank))
        self.a2 = nn.Parameter(torch.randn(*first, rank, base.in_features))

    def delta(self) -> Tensor:
        with autocast_off(self.b1.device):
            return self.scale * (self.b1 @ self.a1) * (self.b2 @ self.a2)

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return add_delta(base, x, y, self.delta())


@hookimpl
def tunerkit_methods() -> Iterator[Method]:
    yield Method("loha", config=Config, stacks=True, foreign={"peft": NAMES})


@hookimpl
def tunerkit_build_adapter(target: Target, base: BaseLayer, config: Config) -> Loha:
    return Loha(base, config.at(target.path, "rank"), config.at(target.path, "alpha"))


@hookimpl
def tunerkit_delta(adapter: Loha) -> Delta:
    return Delta(weight=adapter.delta())
