"""The plugin's hook implementation: the kinds of quantised layers. No library of them is imported here."""

from collections.abc import Iterable

from tunerkit import BaseLayer, hookimpl
from tunerkit_quant.bitsandbytes_4bit import Bitsandbytes4BitLayer
from tunerkit_quant.bitsandbytes_int8 import BitsandbytesInt8Layer
from tunerkit_quant.gptq import GptqLayer
from tunerkit_quant.hqq import HqqLayer
from tunerkit_quant.quanto import QuantoLayer
from tunerkit_quant.torchao import TorchaoLayer

KINDS: tuple[type[BaseLayer], ...] = (
    BitsandbytesInt8Layer,
    Bitsandbytes4BitLayer,
    TorchaoLayer,
    HqqLayer,
    QuantoLayer,
    GptqLayer,
)


@hookimpl
def tunerkit_base_layers() -> Iterable[type[BaseLayer]]:
    """Register the kinds. A model without quantised layers never imports a quantiser."""
    return list(KINDS)
