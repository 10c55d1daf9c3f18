"""SHiRA (Bhardwaj et al., NeurIPS 2024, arXiv 2406.13175): some entries of a weight are trained."""

from collections.abc import Iterator
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

from tunerkit.plugin import Adapter, AdapterConfig, BaseLayer, Delta, Method, add_delta, hookimpl, setting
from tunerkit_methods.sizes import at_most

NAMES = {
    "type": "SHIRA",
    "tensors": {
        "values": "shira_weight",
        "positions": {"name": "shira_indices", "shape": [2, "count"], "integers": "int32"},
    },
    "settings": {"rank": "r", "mask_seed": {"name": "random_seed", "default": None}},
    "constants": {"mask_type": "random"},
    "ignored": ["init_weights"],
    "layers": ["Linear"],
}


@attrs.frozen
class Config(AdapterConfig):
    """The settings of SHiRA."""

    rank: int = setting(8, ge=1, doc="as many entries as LoRA of this rank has; up to 8, or all of them", aka=("r",))
    mask_seed: int | None = setting(
        None, ge=0, doc="seed of the choice of entries; None: torch's default", aka=("random_seed",)
    )


class Sparse(Adapter):
    """ΔW is 0 but for ``values`` (k,) at ``positions`` (2, k), rows and columns, with k = rank · (out + in)."""

    reads_output: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = False
    positions: Tensor

    def __init__(self, base: BaseLayer, config: Config) -> None:
        super().__init__()
        entries, sides = base.out_features * base.in_features, base.out_features + base.in_features
        rank = at_most(config.rank, 8, max(8, entries // sides), "rank, the weight has no more entries")
        generator = torch.Generator()
        if config.mask_seed is not None:
            generator.manual_seed(config.mask_seed)
        # As PEFT draws them.
        drawn = torch.randperm(entries, generator=generator)[: rank * sides].sort().values
        rows, columns = drawn // base.in_features, drawn % base.in_features
        self.register_buffer("positions", torch.stack([rows, columns]))
        self.values = nn.Parameter(torch.zeros(len(drawn)))

    def delta(self, base: BaseLayer) -> Tensor:
        zeros = self.values.new_zeros(base.out_features, base.in_features)
        return zeros.index_put(tuple(self.positions), self.values)

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return add_delta(base, x, y, self.delta(base))


@hookimpl
def tunerkit_methods() -> Iterator[Method]:
    yield Method("shira", config=Config, foreign={"peft": NAMES})


@hookimpl
def tunerkit_build_adapter(base: BaseLayer, config: Config) -> Sparse:
    return Sparse(base, config)


@hookimpl
def tunerkit_delta(adapter: Sparse, base: BaseLayer) -> Delta:
    return Delta(weight=adapter.delta(base))
