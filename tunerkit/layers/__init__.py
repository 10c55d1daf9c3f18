"""Base layers (modules seen as matrices), adapters and low-rank products.

Other packages read a module's weights and forward, and torch's private names, through this package too.
"""

from tunerkit.layers import torch_private, weights
from tunerkit.layers.adapter import Adapter, resize_
from tunerkit.layers.base_layer import BaseLayer, bias_name, has_trainable_bias, view_bias
from tunerkit.layers.kinds import (
    CORE,
    KINDS,
    DenseLinear,
    EmbeddingLayer,
    Knowledge,
    LinearLayer,
    as_base_layer,
    as_base_layers,
)
from tunerkit.layers.low_rank import add_delta, add_low_rank, low_rank_delta, low_rank_factors, mark, misfit, unmark
from tunerkit.layers.norms import NormLayer, as_output
from tunerkit.layers.products import autocast_off
from tunerkit.layers.torch_private import is_packed, numbers_of
from tunerkit.layers.weights import forward_name, forward_owner, is_named, is_sharded, weight_of, whole_shape
