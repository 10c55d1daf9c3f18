"""RandLoRA (Albert et al., ICLR 2025, arXiv 2502.00987): a ΔW of full rank, as a sum of scaled random products."""

from collections.abc import Iterator, Sequence
from math import sqrt

import attrs
import torch
from torch import Tensor, nn

from tunerkit.errors import TargetError
from tunerkit.plugin import Adapter, AdapterConfig, BaseLayer, Factors, Method, add_low_rank, hookimpl, setting
from tunerkit_methods.sizes import at_most

NAMES = {
    "type": "RANDLORA",
    "tensors": {
        "scales": {"name": "randlora_lambda", "shape": ["rank", "bases"]},
        "gains": {"name": "randlora_gamma", "shape": ["bases", "short"]},
    },
    "shared": {name: {"name": f"randlora_{name.upper()}", "optional": True, "repeated": True} for name in ("a", "b")},
    "settings": {
        **{"rank": "r", "alpha": "randlora_alpha", "dropout": "randlora_dropout"},
        **{"seed": "projection_prng_key", "save_bases": "save_projection"},
    },
    "drawn": {"sparse": False, "very_sparse": False},
    "bias": "randlora_only",
    "ignored": ["init_weights"],
}


@attrs.frozen
class Config(AdapterConfig):
    """The settings of RandLoRA."""

    rank: int | None = setting(None, ge=1, doc="rank of each product; None takes 32, or less for small layers")
    alpha: float = setting(640.0, gt=0, doc="numerator of the scale alpha / rank", aka=("randlora_alpha",))
    seed: int = setting(0, ge=0, doc="seed of the random bases", aka=("projection_prng_key",))
    save_bases: bool = setting(
        True,
        doc="whether files hold the bases; if not, they are drawn again, with other numbers before torch 2.12",
        aka=("save_projection",),
    )
    dropout: float = setting(0.0, ge=0, lt=1, doc="share of the input that is dropped", aka=("randlora_dropout",))


class Bases(nn.Module):
    """The random ``a`` (rank, 1, short) and ``b`` (long, n, rank), large enough for all targets, and never trained.

    They are drawn and normalised in bf16, as PEFT does, so that a seed gives the same numbers. Before torch 2.12 it
    gives others, and processors with other vector instructions round about one number in 10,000 differently, by its
    last bit: reasons to save the bases.
    """

    a: Tensor
    b: Tensor

    def __init__(self, rank: int, short: int, long: int, config: Config) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(config.seed)
        for name, count, size in (("a", 1, (rank, 1, short)), ("b", -(-short // rank), (long, 1, rank))):
            empty = [torch.empty(size, dtype=torch.bfloat16) for _ in range(count)]
            drawn = torch.cat([nn.init.kaiming_uniform_(each, a=sqrt(5), generator=generator) for each in empty], 1)
            values = nn.Parameter((drawn / drawn.std()).float(), requires_grad=False)
            if config.save_bases:
                self.register_parameter(name, values)
            else:
                self.register_buffer(name, values.data, persistent=False)


class Sums(Adapter):
    """ΔW = (alpha / rank) · Σⱼ Bⱼ Λⱼ A Γⱼ for out ≥ in, else its transpose: n products make it of full rank.

    Trained are the diagonals Λⱼ, as ``scales`` (rank, n), which start at 0, and Γⱼ, as ``gains`` (n, the shorter side).
    """

    reads_output = reads_weight = False

    def __init__(self, base: BaseLayer, config: Config, shared: Bases) -> None:
        super().__init__()
        rank, short = len(shared.a), min(base.in_features, base.out_features)
        count = -(-short // rank)
        self.scale, self.dropout = config.alpha / rank, config.dropout
        self.scales = nn.Parameter(torch.zeros(rank, count))
        self.gains = nn.Parameter(torch.full((count, short), 1 / max(count, short)))

    def product(self, base: BaseLayer) -> Factors:
        assert isinstance(self.shared, Bases)
        count, short = self.gains.shape
        a, b = self.shared.a.to(self.gains.device), self.shared.b.to(self.gains.device)
        # Rows (i, j) of the first meet columns (j, i) of the second: PEFT pairs them so, and any pairing is random.
        rows = (self.scale * self.scales[:, :, None] * a[..., :short] * self.gains).flatten(0, 1)
        columns = b[: max(base.in_features, base.out_features), :count].flatten(1)
        return Factors(rows, columns) if short == base.in_features else Factors(columns.t(), rows.t())

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        q, p = self.product(base)
        return add_low_rank(base, x, y, q=q, p=p, scale=1.0, dropout=self.dropout if self.training else 0.0)


@hookimpl
def tunerkit_methods() -> Iterator[Method]:
    yield Method("randlora", config=Config, foreign={"peft": NAMES})


@hookimpl
def tunerkit_shared(bases: Sequence[BaseLayer], config: Config) -> Bases:
    short, long = sorted((max(base.in_features for base in bases), max(base.out_features for base in bases)))
    largest = max(min(base.in_features, base.out_features) for base in bases)
    if short == 1:
        raise TargetError("all targets have a single input, or a single output, too few for random bases; add others")
    # PEFT's folders may have a rank above the layers, which `tunerkit_build_adapter` refuses in a new adapter.
    rank = at_most(config.rank, min(32, largest), max(1024, largest), "rank, the shorter side of the largest layer")
    return Bases(rank, short, long, config)


@hookimpl
def tunerkit_build_adapter(base: BaseLayer, config: Config, shared: Bases, loading: bool) -> Sums:
    if not loading:
        at_most(config.rank, 32, shared.a.shape[2], "rank, the shorter side of the largest layer")
    return Sums(base, config, shared)


@hookimpl
def tunerkit_factors(adapter: Sums, base: BaseLayer) -> Factors:
    return adapter.product(base)
