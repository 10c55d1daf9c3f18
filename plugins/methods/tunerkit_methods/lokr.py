"""LoKr (Yeh et al., ICLR 2024, arXiv 2309.14859): the Kronecker product of a small matrix and a low-rank one."""

from collections.abc import Iterator
from math import isqrt, prod, sqrt
from typing import ClassVar

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunerkit.plugin import Adapter, AdapterConfig, BaseLayer, Delta, Method, add_delta, hookimpl, setting

NAMES = {
    "type": "LOKR",
    "tensors": {
        name: {"name": f"lokr_{name}", "optional": True} for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")
    },
    "settings": {"rank": "r", "alpha": "alpha", "factor": "decompose_factor", "decompose_both": "decompose_both"},
    "constants": {"use_effective_conv2d": False},
    "training": {"rank_dropout": 0.0, "module_dropout": 0.0, "rank_dropout_scale": False},
    "ignored": ["init_weights"],
    "layers": ["Linear", "Conv2d"],  # at a Conv1d, PEFT's ΔW is not the product where W₂ is held in full
}


@attrs.frozen
class Config(AdapterConfig):
    """The settings of LoKr."""

    rank: int = setting(8, ge=1, doc="rank of a matrix that is a product; may exceed the layer's sides", aka=("r",))
    alpha: float = setting(8.0, gt=0, doc="numerator of the scale alpha / rank")
    factor: int = setting(
        -1, ge=-1, doc="rows and columns of W₁, or their limit; -1 takes the square root", aka=("decompose_factor",)
    )
    decompose_both: bool = setting(False, doc="whether W₁ may be a product too, where it is large")


class Lokr(Adapter):
    """ΔW = (alpha / rank) · W₁ ⊗ W₂, with W₁ (k, m) and W₂ (o, n), where k o = out and m n = in.

    At a convolution m n is the number of channels, and W₂ (o, n, *kernel). If the rank is below half of the longer side
    of W₂, it is a product of A (o, rank) and B (rank, n). W₁, or its A, starts at 0.
    """

    reads_output: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = False

    def __init__(self, base: BaseLayer, config: Config) -> None:
        super().__init__()
        self.scale = config.alpha / config.rank
        kernel = base.pack(torch.empty(base.out_features, base.in_features, device="meta")).shape[2:]
        k, o = split(base.out_features, config.factor)
        m, n = split(base.in_features // prod(kernel), config.factor)
        products = {"w1": config.decompose_both and config.rank < max(k, m) / 2, "w2": config.rank < max(o, n) / 2}
        for name, shape in {"w1": (k, m), "w2": (o, n, *kernel)}.items():
            parts = {f"{name}_a": (shape[0], config.rank), f"{name}_b": (config.rank, prod(shape[1:]))}
            for part, sizes in parts.items() if products[name] else {name: shape}.items():
                self.register_parameter(part, nn.Parameter(torch.zeros(sizes)))
                if part not in ("w1", "w1_a"):
                    nn.init.kaiming_uniform_(self.get_parameter(part), a=sqrt(5))

    def matrix(self, name: str) -> Tensor:
        """W₁ (k, m) or W₂ (o, n), where a convolution's kernel counts to n."""
        own = dict(self.named_parameters(recurse=False))
        return own[name].flatten(1) if name in own else own[f"{name}_a"] @ own[f"{name}_b"]

    def delta(self) -> Tensor:
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
def tunerkit_build_adapter(base: BaseLayer, config: Config) -> Lokr:
    return Lokr(base, config)


@hookimpl
def tunerkit_delta(adapter: Lokr) -> Delta:
    return Delta(weight=adapter.delta())
