"""LoKr (Yeh et al., ICLR 2024, arXiv 2309.14859): the Kronecker product of a small matrix and a low-rank one."""

from collections.abc import Iterator, Mapping
from math import isqrt, prod, sqrt
from typing import ClassVar, Literal

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunerkit.plugin import Adapter, BaseLayer, Delta, Method, Target, add_delta, hookimpl, setting
from tunerkit_methods.patterned import PatternedConfig


def of_effective(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's tensors of an "effective convolution", whose B (r, n) is a core (r, r, *kernel) times (r, channels)."""
    b = torch.einsum("ij...,jc->ic...", theirs["lokr_t2"], theirs["lokr_w2_b"]).flatten(1)
    return {"lokr_w2_a": theirs["lokr_w2_a"].mT, "lokr_w2_b": b}


_SHAPES = {"w1": ["k", "m"], "w1_a": ["k", "rank"], "w1_b": ["rank", "m"], "w2_a": ["o", "rank"], "w2_b": ["rank", "n"]}
NAMES = {
    "type": "LOKR",
    "tensors": {
        name: {"name": f"lokr_{name}", "optional": True, "shape": _SHAPES.get(name)}
        for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")
    },
    "others": {"lokr_t2": of_effective},
    "settings": {
        "rank": {"name": "r", "pattern": "rank_pattern"},
        "alpha": {"name": "alpha", "pattern": "alpha_pattern"},
        **{"factor": "decompose_factor", "decompose_both": "decompose_both"},
    },
    "fixed": {"conv1d": ("peft", ["Conv1d"])},
    "training": {
        **{"use_effective_conv2d": False, "rank_dropout": 0.0, "module_dropout": 0.0, "rank_dropout_scale": False},
    },
    "ignored": ["init_weights"],
    "layers": ["Linear", "Conv1d", "Conv2d"],
}


@attrs.frozen
class Config(PatternedConfig):
    """The settings of LoKr."""

    rank: int = setting(8, ge=1, doc="rank of a matrix that is a product; may exceed the layer's sides", aka=("r",))
    alpha: float = setting(8.0, gt=0, doc="numerator of the scale alpha / rank")
    factor: int = setting(
        -1, ge=-1, doc="rows and columns of W₁, or their limit; -1 takes the square root", aka=("decompose_factor",)
    )
    decompose_both: bool = setting(False, doc="whether W₁ may be a product too, where it is large")
    rank_pattern: Mapping[str, int] = setting(
        attrs.Factory(dict), ge=1, doc="maps a target pattern to a rank; the first match counts"
    )
    alpha_pattern: Mapping[str, float] = setting(
        attrs.Factory(dict), gt=0, doc="maps a target pattern to an alpha; the first match counts"
    )
    conv1d: Literal["kronecker", "peft"] = setting(
        "kronecker",
        doc="what ΔW of a Conv1d is where W₂ is no product: W₁ ⊗ W₂, or its numbers in the order that PEFT has",
    )


class Lokr(Adapter):
    """ΔW = (alpha / rank) · W₁ ⊗ W₂, with W₁ (k, m) and W₂ (o, n), where k o = out and m n = in.

    At a convolution m n is the number of channels, and W₂ (o, n, *kernel). If the rank is below half of the longer side
    of W₂, it is a product of A (o, rank) and B (rank, n). W₁, or its A, starts at 0.
    """

    reads_output: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = False

    def __init__(self, base: BaseLayer, config: Config, path: str) -> None:
        super().__init__()
        rank: int = config.at(path, "rank")
        self.scale: float = config.at(path, "alpha") / rank
        self.as_peft = config.conv1d == "peft" and isinstance(base.module, nn.Conv1d)
        kernel = base.pack(torch.empty(base.out_features, base.in_features, device="meta")).shape[2:]
        k, o = split(base.out_features, config.factor)
        m, n = split(base.in_features // prod(kernel), config.factor)
        products = {"w1": config.decompose_both and rank < max(k, m) / 2, "w2": rank < max(o, n) / 2}
        for name, shape in {"w1": (k, m), "w2": (o, n, *kernel)}.items():
            parts = {f"{name}_a": (shape[0], rank), f"{name}_b": (rank, prod(shape[1:]))}
            for part, sizes in parts.items() if products[name] else {name: shape}.items():
                self.register_parameter(part, nn.Parameter(torch.zeros(sizes)))
                if part not in ("w1", "w1_a"):
                    nn.init.kaiming_uniform_(self.get_parameter(part), a=sqrt(5))

    def matrix(self, name: str) -> Tensor:
        """W₁ (k, m) or W₂ (o, n), where a convolution's kernel counts to n."""
        own = dict(self.named_parameters(recurse=False))
        return own[name].flatten(1) if name in own else own[f"{name}_a"] @ own[f"{name}_b"]

    def delta(self) -> Tensor:
        if self.as_peft and (w2 := dict(self.named_parameters(recurse=False)).get("w2")) is not None:
            w1 = self.matrix("w1")  # the rows of its product with W₂ (o, n, l) are (o, k, n), and its columns (m, l)
            numbers = torch.einsum("km,onl->oknml", w1, w2)
            return self.scale * numbers.reshape(len(w1) * len(w2), -1)
        return self.scale * torch.kron(self.matrix("w1"), self.matrix("w2"))

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        if not base.linear:
            return add_delta(base, x, y, self.delta())
        w1, w2 = self.matrix("w1"), self.matrix("w2")
        x = x.to(w1.device, w1.dtype).unflatten(-1, (w1.shape[1], w2.shape[1]))  # (..., m, n)
        # (W₁ ⊗ W₂) x takes much less than the whole ΔW. Not w1 @ …, whose last bits depend on what needs gradients.
        added = self.scale * torch.einsum("km,...mo->...ko", w1, F.linear(x, w2)).flatten(-2)
        return y + added.to(y.device, y.dtype)


def split(size: int, factor: int) -> tuple[int, int]:
    """Return two numbers with this product. The first is the factor, or the largest below it and the square root."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = isqrt(size) if factor == -1 else max(1, min(factor, isqrt(size)))
    first = next(first for first in range(most, 0, -1) if size % first == 0)
    return first, size // first


@hookimpl
def tunerkit_methods() -> Iterator[Method]:
    yield Method("lokr", config=Config, foreign={"peft": NAMES})


@hookimpl
def tunerkit_build_adapter(target: Target, base: BaseLayer, config: Config) -> Lokr:
    return Lokr(base, config, target.path)


@hookimpl
def tunerkit_delta(adapter: Lokr) -> Delta:
    return Delta(weight=adapter.delta())
