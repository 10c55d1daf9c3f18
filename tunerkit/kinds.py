"""The base-layer kinds that core brings, and which of several kinds a module has."""

from torch import nn

from tunerkit.attention_layer import AttentionLayer
from tunerkit.base_layers import BaseLayer, Conv1DLayer, ConvLayer, EmbeddingLayer, LinearLayer

KINDS: tuple[type[BaseLayer], ...] = (LinearLayer, Conv1DLayer, ConvLayer, EmbeddingLayer, AttentionLayer)


def describe(module: nn.Module, kinds: tuple[type[BaseLayer], ...] = KINDS) -> BaseLayer | None:
    """The first of ``kinds`` that matches ``module``, holding it; None if tunerkit can't adapt it."""
    for kind in kinds:
        if kind.matches(module):
            return kind(module)
    return None
