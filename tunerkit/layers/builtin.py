"""The base-layer kinds that core brings, and all that it knows of layers and models as one record."""

import attrs
from torch import nn

from tunerkit.layers.attention import AttentionLayer
from tunerkit.layers.base import BaseLayer
from tunerkit.layers.convolution import ConvLayer
from tunerkit.layers.embedding import EmbeddingLayer
from tunerkit.layers.linear import Conv1DLayer, LinearLayer
from tunerkit.libraries import DEFAULT_TARGETS, WEIGHT_READERS
from tunerkit.records import DefaultTargets, WeightReader

KINDS: tuple[type[BaseLayer], ...] = (LinearLayer, Conv1DLayer, ConvLayer, EmbeddingLayer, AttentionLayer)


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


def as_base_layer(module: nn.Module, kinds: tuple[type[BaseLayer], ...] = KINDS) -> BaseLayer | None:
    """The module as the first of ``kinds`` that matches it; None if tunerkit cannot adapt it."""
    return next((kind(module) for kind in kinds if kind.matches(module)), None)
