"""A toy method that adapts outputs, of layers that are no matrices too: norms, activations, whole blocks."""

import attrs
import torch
from torch import Tensor, nn

import tunerkit
from tests.support.toys import OneMethod
from tunerkit.plugin import Adapter, AdapterConfig, BaseLayer, Method, setting


class Affine(Adapter):
    """Replaces the output by y (1 + ``scale``) + ``shift``, both (features,) and 0 at the start."""

    reads_output = True
    reads_weight = False

    def __init__(self, features: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.zeros(features)), nn.Parameter(torch.zeros(features))

    def forward(self, base: BaseLayer, x: Tensor, y: Tensor) -> Tensor:
        return (y * (1 + self.scale) + self.shift).to(y.dtype)


@attrs.frozen
class AffineConfig(AdapterConfig):
    """How wide the outputs are."""

    features: int = setting(8, ge=1, doc="The size of the outputs' last dimension.")


class OutputPlugin(OneMethod):
    """``toy-outputs``."""

    method = Method("toy-outputs", config=AffineConfig, targets="outputs")

    @tunerkit.hookimpl
    def tunerkit_build_adapter(self, config: AffineConfig) -> Affine:
        return Affine(config.features)
