"""VeRA (Kopiczko et al., ICLR 2024, arXiv 2310.11454): two random matrices for all targets, two vectors at each."""

import math
from collections.abc import Iterable, Iterator, Sequence

import attrs
import torch
from torch import Tensor, nn

from tunerkit.plugin import Adapter, AdapterConfig, BaseLayer, Factors, Method, add_low_rank, hookimpl, setting

NAMES = {
    "type": "VERA",
    "tensors": {"b": "vera_lambda_b", "d": {"name": "vera_lambda_d", "shape": ["rank"]}},
    "shared": {"q": {"name": "vera_A", "optional": True}, "p": {"name": "vera_B", "optional": True}},
    "settings": {
        "rank": "r",
        "key": "projection_prng_key",
        "save_projection": "save_projection",
        "dropout": "vera_dropout",
        "start": "d_initial",
    },
    "ignored": ["init_weights"],
    "bias": "vera_only",
}


@attrs.frozen
class Config(AdapterConfig):
    """The settings of VeRA."""

    rank: int | None = setting(
        None, ge=1, doc="rank of both matrices; None means 256, or less if the targets are smaller", aka=("r",)
    )
    key: int = setting(0, ge=0, doc="seed of both matrices, independent of wrap's", aka=("projection_prng_key",))
    save_projection: bool = setting(True, doc="save both matrices, which are drawn again from the key otherwise")
    start: float = setting(0.1, doc="value that d starts at, not 0", aka=("d_initial",))
    dropout: float = setting(0.0, ge=0, lt=1, doc="share of the input dropped in training", aka=("vera_dropout",))

    def problems(self) -> Iterable[str]:
        if self.start == 0:
            yield "expected a number other than 0, with which b and d get no gradient, got 0 @ $.start"


class Shared(nn.Module):
    """Q (rank, in) and P (out, rank), large enough for every target and never trained: PEFT's numbers for the key."""

    def __init__(self, config: Config, bases: Sequence[BaseLayer]) -> None:
        super().__init__()
        sides = [(base.out_features, base.in_features) for base in bases]
        largest_out, largest_in = (max(side) for side in zip(*sides, strict=True))
        rank = min(256, max(min(side) for side in sides)) if config.rank is None else config.rank
        generator = torch.Generator().manual_seed(config.key)
        for name, shape in (("q", (rank, largest_in)), ("p", (largest_out, rank))):
            bound = math.sqrt(6 / shape[1])  # Kaiming's, for the fan-in
            values = torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, values, persistent=config.save_projection)


class Vectors(Adapter):
    """Adds diag(b) P diag(d) Q x (equation 2): b (out,) starts at 0, d (rank,) at a small number."""

    reads_output = False
    reads_weight = False

    def __init__(self, base: BaseLayer, shared: Shared, config: Config) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.d = nn.Parameter(torch.full((len(shared.get_buffer("q")),), config.start))
        self.b = nn.Parameter(torch.zeros(base.out_features))

    @property
    def rank(self) -> int:
        return len(self.d)

    def product(self, base: BaseLayer) -> Factors:
        q, p = self.shared.get_buffer("q"), self.shared.get_buffer("p")
        return Factors(self.d[:, None] * q[:, : base.in_features], self.b[:, None] * p[: base.out_features])

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        q, p = self.product(base)
        return add_low_rank(base, x, y, q=q, p=p, scale=1.0, dropout=self.dropout if self.training else 0.0)


@hookimpl
def tunerkit_methods() -> Iterator[Method]:
    yield Method("vera", config=Config, foreign={"peft": NAMES})


@hookimpl
def tunerkit_shared(bases: Sequence[BaseLayer], config: Config) -> Shared:
    return Shared(config, bases)


@hookimpl
def tunerkit_build_adapter(base: BaseLayer, config: Config, shared: Shared) -> Vectors:
    return Vectors(base, shared, config)


@hookimpl
def tunerkit_factors(adapter: Vectors, base: BaseLayer) -> Factors:
    return adapter.product(base)
