"""A toy method that adapts outputs, of layers that are no matrices too: norms, activations, whole blocks."""

import attrs

import tunerkit
from tests.support.toys import OneMethod
from tunerkit.plugin import AdapterConfig, Method, setting
from tunerkit_testing.toy_adapters import Affine


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
