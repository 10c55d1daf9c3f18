"""Base layers: how each kind reads its input, is added to, and shows its weight as a matrix; low-rank products."""

from tunerkit.layers.adapter import Adapter
from tunerkit.layers.base import BaseLayer
from tunerkit.layers.bias import bias_name, has_trainable_bias, view_bias
from tunerkit.layers.builtin import CORE, KINDS, Knowledge, as_base_layer, as_base_layers
from tunerkit.layers.fused import autocast_off, mark_fresh, plain_form, unmark
from tunerkit.layers.low_rank import add_low_rank, low_rank_delta, low_rank_factors, misfit
from tunerkit.layers.outputs import OutputLayer
from tunerkit.layers.packed import PackedLinear
from tunerkit.layers.resizing import resize_
from tunerkit.layers.sketches import Sketch
