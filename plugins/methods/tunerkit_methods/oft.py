"""OFT (Qiu et al., NeurIPS 2023, arXiv 2306.07280): turns blocks of the input, as OFTv2 does (arXiv 2506.19847)."""

from collections.abc import Iterator

import attrs
import torch
from torch import Tensor, nn

from tunerkit.errors import TargetError
from tunerkit.plugin import Adapter, AdapterConfig, BaseLayer, Delta, Method, autocast_off, hookimpl, setting
from tunerkit_methods.inputs import blockwise, refuse_ids, through, wide_weight
from tunerkit_methods.sizes import divisor

NAMES = {
    "type": "OFT",
    "tensors": {"v": "oft_R.weight"},
    "settings": {
        # PEFT takes the nearest size that fits where 32 does not, as None does here.
        "block_size": {"name": "oft_block_size", "values": {None: 32} | {size: size for size in range(2, 4097)}},
        "shared_block": "block_share",
        "neumann": "use_cayley_neumann",
        "terms": "num_cayley_neumann_terms",
    },
    "constants": {"r": 0, "coft": False},
    "training": {"module_dropout": 0.0},
    "ignored": ["init_weights", "eps"],
    "layers": ["Linear"],  # at a convolution, what PEFT merges is not what it computes: it turns overlapping patches
    "bias": "oft_only",
}


@attrs.frozen
class Config(AdapterConfig):
    """The settings of OFT."""

    block_size: int | None = setting(
        None, ge=2, doc="inputs of a block; None means 32, or the nearest that fits", aka=("oft_block_size",)
    )
    shared_block: bool = setting(False, doc="turn all blocks of a layer alike", aka=("block_share",))
    neumann: bool = setting(True, doc="sum powers in place of inverting a matrix", aka=("use_cayley_neumann",))
    terms: int = setting(5, ge=4, doc="powers to sum, the identity among them", aka=("num_cayley_neumann_terms",))


class Rotation(Adapter):
    """Replaces x by x R, and so W by W Rᵀ: R has blocks (n, n) along its diagonal, each made of its row of V.

    A row has the n (n − 1) / 2 numbers above the diagonal of Q = −Qᵀ. R = (I + Q) (I − Q)⁻¹ = I + 2 Q + 2 Q² + …, cut
    off after ``terms`` powers, the last of which counts once; or exactly (I − Q) (I + Q)⁻¹, which turns the other way.
    """

    reads_output = False
    reads_weight = True

    def __init__(self, features: int, size: int, config: Config) -> None:
        super().__init__()
        self.size, self.terms = size, config.terms if config.neumann else 0
        blocks = 1 if config.shared_block else features // size
        self.v = nn.Parameter(torch.zeros(blocks, size * (size - 1) // 2))

    def turn(self) -> Tensor:
        """R − I, (blocks, n, n), in fp32 or a wider dtype: 0 at the start, to the last bit."""
        v = self.v.to(torch.promote_types(self.v.dtype, torch.float32))
        rows, columns = torch.triu_indices(self.size, self.size, 1, device=v.device)
        upper = v.new_zeros(len(v), self.size, self.size)
        upper[:, rows, columns] = v
        q = upper - upper.mT
        turn: Tensor
        with autocast_off(v.device):
            if not self.terms:
                turn = torch.linalg.solve(torch.eye(self.size, dtype=v.dtype, device=v.device) + q, -2 * q)
            else:
                power, turn = q, 2 * q
                for _ in range(self.terms - 3):
                    power = power @ q
                    turn = turn + 2 * power
                turn = turn + power @ q
        return turn

    def turned(self, rows: Tensor, back: bool) -> Tensor:
        """Rows (..., in) times R - I, or the transposed one."""
        turn = self.turn()
        return blockwise(rows, turn.mT if back else turn)

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return y + through(base, x, y, self.v.dtype, self.turned).to(y.dtype)


@hookimpl
def tunerkit_methods() -> Iterator[Method]:
    yield Method("oft", config=Config, foreign={"peft": NAMES})


@hookimpl
def tunerkit_build_adapter(base: BaseLayer, config: Config) -> Rotation:
    refuse_ids(base, "oft turns")
    features = base.in_features
    if features == 1:
        raise TargetError("oft turns the inputs of a layer, and this one has a single input; leave it out")
    fitting = [size for size in range(2, features + 1) if features % size == 0]
    nearest = min(fitting, key=lambda size: (abs(size - 32), size))
    size = divisor(config.block_size or nearest, 1, features, "block_size, the inputs of the layer", least=2)
    return Rotation(features, size, config)


@hookimpl
def tunerkit_delta(adapter: Rotation, base: BaseLayer) -> Delta:
    with autocast_off(adapter.v.device):
        return Delta(weight=adapter.turned(wide_weight(base, adapter.v.dtype), True))
