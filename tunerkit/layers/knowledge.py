"""What is known of layers and models, as one record: core's own, to which plugins add."""

import attrs

from tunerkit.layers.base import BaseLayer
from tunerkit.layers.builtin import KINDS
from tunerkit.libraries import DEFAULT_TARGETS, WEIGHT_READERS
from tunerkit.records import DefaultTargets, WeightReader


@attrs.frozen(eq=False)
class Knowledge:
    """Base-layer kinds, classes that use a child's weight directly, and architectures' default targets.

    Of two records that speak of one module, class or architecture, the first one counts.
    """

    kinds: tuple[type[BaseLayer], ...]
    weight_readers: tuple[WeightReader, ...]
    default_targets: tuple[DefaultTargets, ...]


CORE = Knowledge(KINDS, WEIGHT_READERS, DEFAULT_TARGETS)
