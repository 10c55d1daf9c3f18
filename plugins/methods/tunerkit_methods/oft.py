"""OFT (Qiu et al., NeurIPS 2023, arXiv 2306.07280): turns blocks of the input, as OFTv2 does (arXiv 2506.19847)."""

from collections.abc import Iterable, Iterator

import attrs
import torch
from torch import Tensor, nn

from tunerkit.errors import TargetError
from tunerkit.plugin import Adapter, AdapterConfig, BaseLayer, Delta, Method, autocast_off, hookimpl, setting
from tunerkit_methods.inputs import blockwise, through, wide_weight
from tunerkit_methods.sizes import divisor

NAMES = {
    "type": "OFT",
    "tensors": {"v": {"name": "oft_R.weight", "embedding": "oft_embedding_R.weight"}},
    "settings": {
        # PEFT takes the nearest size that fits where 32 does not, as None does here.
        "block_size": {"name": "oft_block_size", "none": 32},
        "blocks": {"name": "r", "default": 0, "instead_of": "block_size"},
        "shared_block": "block_share",
        "neumann": "use_cayley_neumann",
        "terms": "num_cayley_neumann_terms",
        "constrained": {"name": "coft", "default": False},
        "eps": {"name": "eps", "default": 6e-5},
    },
    "training": {"module_dropout": 0.0},
    "ignored": ["init_weights"],
    "layers": ["Linear", "Conv2d", "Embedding"],
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
    terms: int = setting(
        5, ge=4, le=1000, doc="powers to sum, the identity among them", aka=("num_cayley_neumann_terms",)
    )
    blocks: int | None = setting(None, ge=1, doc="blocks of each layer, in place of block_size", aka=("r",))
    constrained: bool = setting(False, doc="keep each block near the identity, as constrained OFT does", aka=("coft",))
    eps: float = setting(
        6e-5, ge=0, doc="the largest length of Q in constrained OFT, times the root of the number of blocks"
    )

    def problems(self) -> Iterable[str]:
        if self.blocks is not None and self.block_size is not None:
            yield f"expected one of block_size and blocks, got {self.block_size} and {self.blocks} @ $.blocks"

    def fit(self, features: int, *, loading: bool) -> int:
        """The size of blocks at a layer with so many features: for a file, the nearest that fits, as PEFT takes it."""
        sizes = [size for size in range(2, features + 1) if features % size == 0]
        if self.blocks is not None:
            if loading:
                return features // _nearest([features // size for size in sizes], self.blocks)
            return features // divisor(self.blocks, 1, features, "blocks, the inputs of the layer")
        if self.block_size is None or loading:
            return _nearest(sizes, self.block_size or 32)
        return divisor(self.block_size, 1, features, "block_size, the inputs of the layer", least=2)


def _nearest(fitting: Iterable[int], wanted: int) -> int:
    return min(fitting, key=lambda each: (abs(each - wanted), each))


class Rotation(Adapter):
    """Replaces x by x R, and so W by W Rᵀ: R has blocks (n, n) along its diagonal, each made of its row of V.

    An embedding has no x to turn, so its output y becomes y R.

    A row has the n (n − 1) / 2 numbers above the diagonal of Q = −Qᵀ. R = (I + Q) (I − Q)⁻¹ = I + 2 Q + 2 Q² + …, cut
    off after ``terms`` powers, the last of which counts once; or exactly (I − Q) (I + Q)⁻¹, which turns the other way.
    Constrained, a Q longer than eps / √blocks is shortened to that.
    """

    reads_weight = True

    def __init__(self, base: BaseLayer, features: int, size: int, config: Config) -> None:
        super().__init__()
        self.reads_output = isinstance(base.module, nn.Embedding)  # type: ignore[misc]  # of this target alone
        self.size, self.terms = size, config.terms if config.neumann else 0
        self.eps = config.eps if config.constrained else None
        blocks = 1 if config.shared_block else features // size
        self.v = nn.Parameter(torch.zeros(blocks, size * (size - 1) // 2))

    def turn(self) -> Tensor:
        """R − I, (blocks, n, n), in fp32 or a wider dtype: 0 at the start, to the last bit."""
        v = self.v.to(torch.promote_types(self.v.dtype, torch.float32))
        if self.eps is not None:
            length = 2**0.5 * v.detach().norm(dim=1, keepdim=True)  # of Q, which has each number twice
            v = v * (self.eps / len(v) ** 0.5 / length.clamp_min(1e-30)).clamp(max=1)
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
        if not self.reads_output:
            return y + through(base, x, y, self.v.dtype, self.turned).to(y.dtype)
        return y + self.turned(y.to(torch.promote_types(self.v.dtype, y.dtype)), False).to(y.dtype)


@hookimpl
def tunerkit_methods() -> Iterator[Method]:
    yield Method("oft", config=Config, multiplies=True, foreign={"peft": NAMES})


@hookimpl
def tunerkit_build_adapter(base: BaseLayer, config: Config, loading: bool) -> Rotation:
    features = base.out_features if isinstance(base.module, nn.Embedding) else base.in_features
    if features == 1:
        raise TargetError("oft turns the inputs of a layer, and this one has a single input; leave it out")
    return Rotation(base, features, config.fit(features, loading=loading), config)


@hookimpl
def tunerkit_delta(adapter: Rotation, base: BaseLayer) -> Delta:
    weight = wide_weight(base, adapter.v.dtype)
    with autocast_off(adapter.v.device):
        return Delta(
            weight=adapter.turned(weight.mT, False).mT if adapter.reads_output else adapter.turned(weight, True)
        )
