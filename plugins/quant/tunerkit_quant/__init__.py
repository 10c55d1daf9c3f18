"""Quantised base models for tunerkit: kinds for the layers of bitsandbytes, torchao, HQQ, quanto and GPTQModel."""

from tunerkit_quant.packed import PackedLinear
from tunerkit_quant.plugin import KINDS

__all__ = ["KINDS", "PackedLinear"]
