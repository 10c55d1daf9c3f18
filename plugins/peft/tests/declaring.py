"""A method that declares PEFT's names for VeRA, for tests of what is declared: shared tensors, sizes and settings."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import attrs
import torch
from torch import Tensor, nn

from tunerkit.plugin import Adapter, AdapterConfig, BaseLayer, Factors, Method, add_low_rank, hookimpl, setting

NAME = "example-vera"  # another one than that of an installed method
NAMES: dict[str, Any] = {
    "type": "VERA",
    "tensors": {
        "b": {"name": "vera_lambda_b", "shape": ["out"]},
        "d": {"name": "vera_lambda_d", "shape": ["rank"]},
    },
    "shared": {"q": "vera_A", "p": "vera_B"},
    "settings": {"rank": "r"},
    "constants": {"save_projection": True},
    "training": {"vera_dropout": 0.0},
    "ignored": ["d_initial", "projection_prng_key", "init_weights"],
    "bias": "vera_only",
}


@attrs.frozen
class Config(AdapterConfig):
    """The settings of VeRA."""

    rank: int = setting(32, ge=1, doc="rank of the shared matrices")


class Shared(nn.Module):
    """``q`` (r, in) and ``p`` (out, r), large enough for every target. They are never trained."""

    def __init__(self, rank: int, bases: Sequence[BaseLayer]) -> None:
        super().__init__()
        features_in, features_out = max(b.in_features for b in bases), max(b.out_features for b in bases)
        self.q = nn.Parameter(torch.randn(rank, features_in) / features_in**0.5, requires_grad=False)
        self.p = nn.Parameter(torch.randn(features_out, rank) / rank**0.5, requires_grad=False)


class Vectors(Adapter):
    """Adds diag(b) P diag(d) Q x, with trained ``d`` (r,) and ``b`` (out,)."""

    reads_output: ClassVar[bool] = False

    def __init__(self, base: BaseLayer, rank: int) -> None:
        super().__init__()
        self.d = nn.Parameter(torch.full((rank,), 0.1))
        self.b = nn.Parameter(torch.zeros(base.out_features))

    def product(self, base: BaseLayer) -> Factors:
        assert isinstance(self.shared, Shared)
        q, p = self.shared.q[:, : base.in_features], self.shared.p[: base.out_features]
        return Factors(q=self.d[:, None] * q, p=self.b[:, None] * p)

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        product = self.product(base)
        return add_low_rank(base, x, y, q=product.q, p=product.p, scale=1.0)


class Plugin:
    """The method with a declaration."""

    def __init__(self, names: Mapping[str, Any]) -> None:
        self.names = names

    @hookimpl
    def tunerkit_methods(self) -> Iterator[Method]:
        yield Method(NAME, config=Config, foreign={"peft": self.names})

    @hookimpl
    def tunerkit_shared(self, bases: Sequence[BaseLayer], config: Config) -> Shared:
        return Shared(config.rank, bases)

    @hookimpl
    def tunerkit_build_adapter(self, base: BaseLayer, config: Config) -> Vectors:
        return Vectors(base, config.rank)

    @hookimpl
    def tunerkit_factors(self, adapter: Vectors, base: BaseLayer) -> Factors:
        return adapter.product(base)
