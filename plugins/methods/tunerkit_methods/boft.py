"""BOFT (Liu et al., ICLR 2024, arXiv 2311.06243): turns a layer's input by a butterfly of block matrices."""

from collections.abc import Iterable, Iterator

import attrs
import torch
from torch import Tensor, nn

from tunerkit.errors import TargetError
from tunerkit.plugin import Adapter, AdapterConfig, BaseLayer, Delta, Method, autocast_off, hookimpl, setting
from tunerkit_methods.inputs import blockwise, refuse_ids, through, wide_weight

NAMES = {
    "type": "BOFT",
    "tensors": {
        "t": {"name": "boft_R", "shape": ["factors", "blocks", "block_size", "block_size"]},
        "s": {"name": "boft_s", "shape": ["out", 1], "convolution": [1, "out"]},
    },
    "settings": {
        "block_size": "boft_block_size",
        "blocks": {"name": "boft_block_num", "default": 0, "instead_of": "block_size"},
        # Without its CUDA extension, PEFT has one factor, whatever its config says.
        "factors": {
            **{"name": "boft_n_butterfly_factor", "measured": True},
            "portable": [1, "PEFT reads more than one only where its CUDA extension is installed"],
        },
    },
    "training": {"boft_dropout": 0.0},
    "ignored": ["init_weights"],
    "layers": ["Linear", "Conv2d"],
    "bias": "boft_only",
}


@attrs.frozen
class Config(AdapterConfig):
    """The settings of BOFT."""

    block_size: int | None = setting(
        None, ge=2, doc="inputs of a block, b; None means 4, or the nearest that fits", aka=("boft_block_size",)
    )
    factors: int | None = setting(
        1,
        ge=1,
        le=63,  # 2 ** (factors - 1) is a number of blocks
        doc="factors of the butterfly, m; None means 2 where they fit, or 1. PEFT reads more than 1 where its CUDA "
        "extension is installed",
        aka=("boft_n_butterfly_factor",),
    )
    blocks: int | None = setting(
        None, ge=1, doc="blocks of each layer, in place of block_size", aka=("boft_block_num",)
    )

    def problems(self) -> Iterable[str]:
        if self.blocks is not None and self.block_size is not None:
            yield f"expected one of block_size and blocks, got {self.block_size} and {self.blocks} @ $.blocks"

    def fit(self, features: int) -> tuple[int, int]:
        """The size of blocks and the number of factors at a layer with so many inputs."""
        counts = (2, 1) if self.factors is None else (self.factors,)
        given = features // self.blocks if self.blocks is not None and features % self.blocks == 0 else self.block_size
        for count in counts:  # a factor i > 0 mixes the halves of 2ⁱ⁺¹ blocks, so it needs two of each
            sizes = range(2, features + 1) if given is None else (given,)
            fitting = [n for n in sizes if features % (n * 2 ** (count - 1)) == 0 and (count == 1 or n % 2 == 0)]
            if fitting and (self.blocks is None or given is not None):
                return min(fitting, key=lambda size: (abs(size - 4), size)), count
        wanted = f"block_size {self.block_size}" if self.blocks is None else f"blocks {self.blocks}"
        raise TargetError(
            f"{wanted} and factors {self.factors} do not fit a layer with {features} inputs: "
            "block_size · 2 ** (factors - 1) must divide them, and so must blocks, with an even block_size above 1 "
            "factor; leave them out"
        )


class Butterfly(Adapter):
    """Replaces W x by s ∘ (W Rᵀ x), with s (out,) and R = R_m … R_1 (in, in), each orthogonal (equation 5).

    R_i = P_i B_i P_iᵀ: B_i has blocks (b, b) along its diagonal, the Cayley transforms (I − S) (I + S)⁻¹ of
    S = (T − Tᵀ) / 2, with T (m, blocks, b, b); P_i puts half blocks that are 2ⁱ⁻¹ apart side by side.
    """

    reads_output = True
    reads_weight = True

    def __init__(self, base: BaseLayer, size: int, factors: int) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.zeros(factors, base.in_features // size, size, size))
        self.s = nn.Parameter(torch.ones(base.out_features))

    def turned(self, rows: Tensor, back: bool) -> Tensor:
        """Rows (..., in) times R - I, or the transposed one: 0 at the start, to the last bit."""
        t = self.t.to(torch.promote_types(self.t.dtype, torch.float32))
        skew, one = (t - t.mT) / 2, torch.eye(t.shape[-1], dtype=t.dtype, device=t.device)
        with autocast_off(t.device):
            blocks = -2 * torch.linalg.solve(one + skew, skew)  # R_i - I
        turned, half = rows, t.shape[-1] // 2
        for i in range(len(t)) if back else reversed(range(len(t))):
            pieces = turned.unflatten(-1, (-1, 2, 2**i, half)).transpose(-3, -2).flatten(-4) if i else turned
            pieces = blockwise(pieces, blocks[i].mT if back else blocks[i])
            turned = turned + (pieces.unflatten(-1, (-1, 2**i, 2, half)).transpose(-3, -2).flatten(-4) if i else pieces)
        return turned - rows

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        s, bias = base.shape_bias(self.s), base.bias()
        without = y if bias is None else y - base.shape_bias(bias)
        return y + ((s - 1) * without + s * through(base, x, y, self.t.dtype, self.turned)).to(y.dtype)


@hookimpl
def tunerkit_methods() -> Iterator[Method]:
    yield Method("boft", config=Config, multiplies=True, foreign={"peft": NAMES})


@hookimpl
def tunerkit_build_adapter(base: BaseLayer, config: Config) -> Butterfly:
    refuse_ids(base, "boft turns")
    return Butterfly(base, *config.fit(base.in_features))


@hookimpl
def tunerkit_delta(adapter: Butterfly, base: BaseLayer) -> Delta:
    weight, s = wide_weight(base, adapter.t.dtype), adapter.s[:, None]
    with autocast_off(adapter.t.device):
        return Delta(weight=(s - 1) * weight + s * adapter.turned(weight, True))
