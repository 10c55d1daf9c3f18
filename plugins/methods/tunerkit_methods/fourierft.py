"""FourierFT (Gao et al., ICML 2024, arXiv 2405.03003): a few coefficients of the two-dimensional spectrum of ΔW."""

from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

from tunerkit.plugin import Adapter, BaseLayer, Delta, Method, Target, add_delta, hookimpl, setting
from tunerkit_methods.patterned import PatternedConfig
from tunerkit_methods.sizes import at_most

NAMES = {
    "type": "FOURIERFT",
    "tensors": {"spectrum": {"name": "fourierft_spectrum", "shape": ["count"]}},
    "settings": {
        "count": {"name": "n_frequency", "pattern": "n_frequency_pattern"},
        **{"scale": "scaling", "seed": "random_loc_seed"},
    },
    "bias": "fourier_only",
    "ignored": ["init_weights"],
}


@attrs.frozen
class Config(PatternedConfig):
    """The settings of FourierFT."""

    count: int | None = setting(
        None, ge=1, doc="trained coefficients; None takes 1000, or all of a small layer", aka=("n_frequency",)
    )
    count_pattern: Mapping[str, int] = setting(
        attrs.Factory(dict),
        ge=1,
        doc="maps a target pattern to a count; the first match counts",
        aka=("n_frequency_pattern",),
    )
    scale: float = setting(150.0, doc="factor of ΔW, not 0", aka=("scaling",))
    seed: int = setting(777, ge=0, doc="seed of the places of the coefficients", aka=("random_loc_seed",))

    def problems(self) -> Iterable[str]:
        if self.scale == 0:
            yield "expected a number other than 0, with which nothing is added, got 0 @ $.scale"


class Spectrum(Adapter):
    """ΔW = scale · Re F⁻¹(S), where S (out, in) has the trained coefficients at random places, and 0 elsewhere.

    F⁻¹ is the inverse discrete Fourier transform in both dimensions. All coefficients start at 0; in the paper, they
    start as normal numbers, so that ΔW is not 0.
    """

    reads_output: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = False
    places: Tensor

    def __init__(self, base: BaseLayer, config: Config, path: str) -> None:
        super().__init__()
        self.shape, self.scale = (base.out_features, base.in_features), config.scale
        size = base.out_features * base.in_features
        count = at_most(config.at(path, "count"), 1000, size, "count, the numbers in W")
        places = torch.randperm(size, generator=torch.Generator().manual_seed(config.seed))[:count]
        self.register_buffer("places", places, persistent=False)  # (count,), in W flattened
        self.spectrum = nn.Parameter(torch.zeros(count))

    def delta(self) -> Tensor:
        wide = self.spectrum.to(torch.promote_types(self.spectrum.dtype, torch.float32))
        flat = wide.new_zeros(self.shape[0] * self.shape[1]).index_copy(0, self.places, wide)
        change: Tensor = self.scale * torch.fft.ifft2(flat.view(self.shape)).real
        return change

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return add_delta(base, x, y, self.delta().to(self.spectrum.dtype))


@hookimpl
def tunerkit_methods() -> Iterator[Method]:
    yield Method("fourierft", config=Config, foreign={"peft": NAMES})


@hookimpl
def tunerkit_build_adapter(target: Target, base: BaseLayer, config: Config) -> Spectrum:
    return Spectrum(base, config, target.path)


@hookimpl
def tunerkit_delta(adapter: Spectrum) -> Delta:
    return Delta(weight=adapter.delta())
