"""A toy method that adapts outputs, of layers that are no matrices too: norms, activations, whole blocks."""

import attrs
import torch
from torch import Tensor, nn

import tunerkit


@attrs.frozen
class AffineConfig(tunerkit.AdapterConfig):
    """How wide the outputs are."""

    features: int = tunerkit.setting(8, ge=1, doc="The size of the outputs' last dimension.")


class Affine(tunerkit.Adapter):
    """Replaces the output by y (1 + ``scale``) + ``shift``, both (features,) and 0 at the start."""

    reads_output = True
    reads_weight = False

    def __init__(self, features: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.zeros(features)), nn.Parameter(torch.zeros(features))

    def forward(self, base: tunerkit.BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return (y + y * self.scale + self.shift).to(y.dtype)


class OutputPlugin:
    """``toy-outputs``."""

    @tunerkit.hookimpl
    def tunerkit_methods(self) -> list[tunerkit.Method]:
        return [tunerkit.Method("toy-outputs", config=AffineConfig, targets="outputs")]

    @tunerkit.hookimpl
    def tunerkit_build_adapter(self, config: AffineConfig) -> Affine:
        return Affine(config.features)
