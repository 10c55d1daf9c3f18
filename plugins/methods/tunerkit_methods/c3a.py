"""C3A (Chen et al., 2024, arXiv 2407.19342): ΔW of circulant blocks, multiplied by fast Fourier transforms."""

from collections.abc import Iterator, Mapping
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

from tunerkit.plugin import Adapter, BaseLayer, Delta, Method, Target, add_delta, hookimpl, setting
from tunerkit_methods.patterned import PatternedConfig
from tunerkit_methods.sizes import common_divisor

NAMES = {
    "type": "C3A",
    "tensors": {"kernel": {"name": "c3a_kernel", "shape": ["rows", "columns", "block_size"]}},
    "settings": {"block_size": {"name": "block_size", "pattern": "block_size_pattern"}},
    "bias": "c3a_only",
    "ignored": ["init_weights"],
    "layers": ["Linear"],
}


@attrs.frozen
class Config(PatternedConfig):
    """The settings of C3A."""

    block_size: int | None = setting(
        None, ge=1, doc="rows and columns of a block; it divides both sides of W. None takes the largest up to 256"
    )
    block_size_pattern: Mapping[str, int] = setting(
        attrs.Factory(dict), ge=1, doc="maps a target pattern to a block size; the first match counts"
    )


class Circulant(Adapter):
    """ΔW = C / in, of out/b x in/b blocks with b rows: block (m, n) is C[i, j] = kernel[m, n, (j − i) mod b].

    The kernel (out/b, in/b, b) holds the first row of each block. It starts at 0.
    """

    reads_output: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = False

    def __init__(self, base: BaseLayer, size: int | None) -> None:
        super().__init__()
        both = base.out_features, base.in_features
        b = common_divisor(size, 256, both, "block_size, both sides of the layer")
        self.kernel = nn.Parameter(torch.zeros(base.out_features // b, base.in_features // b, b))

    def delta(self) -> Tensor:
        rows, columns, b = self.kernel.shape
        at = torch.arange(b, device=self.kernel.device)
        blocks = self.kernel[:, :, (at - at[:, None]) % b]  # (out/b, in/b, b, b)
        return blocks.transpose(1, 2).reshape(rows * b, columns * b) / (columns * b)

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        if not base.linear or not x.numel():  # MKL transforms no empty batch
            return add_delta(base, x, y, self.delta())
        _, columns, b = self.kernel.shape
        wide = torch.promote_types(self.kernel.dtype, torch.float32)  # there are no transforms in half precision
        spectrum = torch.fft.rfft(x.to(self.kernel.device, wide).unflatten(-1, (columns, b)))  # (..., in/b, b/2 + 1)
        products = torch.einsum("...nf,mnf->...mf", spectrum, torch.fft.rfft(self.kernel.to(wide)).conj())
        added: Tensor = torch.fft.irfft(products, n=b).flatten(-2) / (columns * b)  # a correlation with each first row
        return y + added.to(y.device, y.dtype)


@hookimpl
def tunerkit_methods() -> Iterator[Method]:
    yield Method("c3a", config=Config, foreign={"peft": NAMES})


@hookimpl
def tunerkit_build_adapter(target: Target, base: BaseLayer, config: Config) -> Circulant:
    return Circulant(base, config.at(target.path, "block_size"))


@hookimpl
def tunerkit_delta(adapter: Circulant) -> Delta:
    return Delta(weight=adapter.delta())
