"""OFT (Qiu et al., 2023): W times an orthogonal matrix, of blocks along its diagonal."""

from collections.abc import Iterator
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

from tunerkit.plugin import Adapter, AdapterConfig, BaseLayer, Delta, Method, add_low_rank, hookimpl, setting


@attrs.frozen
class Config(AdapterConfig):
    """The settings of OFT."""

    blocks: int = setting(4, ge=1, doc="most blocks along the diagonal; fewer where they do not divide the outputs")


class Rotation(Adapter):
    """Replaces W by R W, with R = (I − S)(I + S)⁻¹ in each block and S = T − Tᵀ; ``t`` (blocks, n, n) starts at 0."""

    reads_output: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = True

    def __init__(self, base: BaseLayer, blocks: int) -> None:
        super().__init__()
        count = next(count for count in range(blocks, 0, -1) if base.out_features % count == 0)
        size = base.out_features // count
        self.t = nn.Parameter(torch.zeros(count, size, size))

    def change(self, base: BaseLayer) -> Tensor:
        """(R − I) W, (out, in)."""
        s, one = (self.t - self.t.mT).float(), torch.eye(self.t.shape[1], device=self.t.device)
        rotated = -2 * torch.linalg.solve(one + s, s)  # R − I, which is 0 at the start, to the last bit
        change: Tensor = rotated @ base.dense().float().reshape(len(s), s.shape[1], -1)
        return change.flatten(0, 1)

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        change = self.change(base).to(self.t.dtype)
        return add_low_rank(base, x, y, q=change, p=torch.eye(len(change)).to(change), scale=1.0)


@hookimpl
def tunerkit_methods() -> Iterator[Method]:
    yield Method("oft", config=Config)


@hookimpl
def tunerkit_build_adapter(base: BaseLayer, config: Config) -> Rotation:
    return Rotation(base, config.blocks)


@hookimpl
def tunerkit_delta(adapter: Rotation, base: BaseLayer) -> Delta:
    return Delta(weight=adapter.change(base))
