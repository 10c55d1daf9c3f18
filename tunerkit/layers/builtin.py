"""The base-layer kinds that core provides, and which of several kinds a module has."""

from torch import nn

from tunerkit.layers.attention import AttentionLayer
from tunerkit.layers.base import BaseLayer
from tunerkit.layers.convolution import ConvLayer
from tunerkit.layers.embedding import EmbeddingLayer
from tunerkit.layers.linear import Conv1DLayer, LinearLayer

KINDS: tuple[type[BaseLayer], ...] = (LinearLayer, Conv1DLayer, ConvLayer, EmbeddingLayer, AttentionLayer)


def as_base_layer(module: nn.Module, kinds: tuple[type[BaseLayer], ...] = KINDS) -> BaseLayer | None:
    """The module as the first of ``kinds`` that matches it; None if tunerkit cannot adapt it."""
    return next((kind(module) for kind in kinds if kind.matches(module)), None)
