"""What is known of layers and models, as one record: core's own, to which plugins add."""

import attrs

from tunerkit.layers.base import BaseLayer
from tunerkit.layers.builtin import KINDS
from tunerkit.libraries import DEFAULT_TARGETS, WEIGHT_READERS
from tunerkit.records import DefaultTargets, WeightReader


@attrs.frozen(eq=False)
class Knowledge:
    """What is known of layers and models. If two records describe the same class or architecture, the first counts.

    Attributes:
        kinds: The base-layer kinds.
        weight_readers: The classes that use a child's weight directly.
        default_targets: The default targets of architectures.
    """

    kinds: tuple[type[BaseLayer], ...]
    weight_readers: tuple[WeightReader, ...]
    default_targets: tuple[DefaultTargets, ...]


CORE = Knowledge(KINDS, WEIGHT_READERS, DEFAULT_TARGETS)
