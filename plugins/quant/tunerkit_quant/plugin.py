"""The hooks: the kinds of quantised layers, and what is refused with others. No library of them is imported here."""

import sys
from collections.abc import Iterable, Sequence

from torch import nn

from tunerkit.plugin import BaseLayer, Restriction, TargetError, hookimpl
from tunerkit_quant.bitsandbytes_4bit import Bitsandbytes4BitLayer, allow_repacking_, forbid_repacking_
from tunerkit_quant.bitsandbytes_int8 import BitsandbytesInt8Layer
from tunerkit_quant.bitsandbytes_parameters import Bitsandbytes4BitParameter
from tunerkit_quant.gptq import GptqLayer
from tunerkit_quant.hqq import HqqLayer
from tunerkit_quant.quanto import QuantoLayer
from tunerkit_quant.torchao import TorchaoLayer
from tunerkit_quant.transformers_models import forget_quantisation_

KINDS: tuple[type[BaseLayer], ...] = (
    BitsandbytesInt8Layer,
    Bitsandbytes4BitLayer,
    Bitsandbytes4BitParameter,
    TorchaoLayer,
    HqqLayer,
    QuantoLayer,
    GptqLayer,
)


@hookimpl
def tunerkit_base_layers() -> Iterable[type[BaseLayer]]:
    """Register the kinds. A model without quantised layers never imports a quantiser."""
    return list(KINDS)


@hookimpl
def tunerkit_adapted(model: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Keep bitsandbytes from repacking weights, also of a layer that came into the model after its first adapter."""
    if modules and "bitsandbytes" in sys.modules:
        forbid_repacking_(model)


@hookimpl
def tunerkit_unwrapped(model: nn.Module) -> None:
    """Undo that. Where ``unwrap`` has made all layers dense, transformers is told so."""
    allow_repacking_(model)
    forget_quantisation_(model)


_PACKED = "Call tunerkit.merge on the unquantised base instead: load the adapter onto it"
# Of layers that were quantised after wrapping: the kinds above know how to add to those that were before.
RESTRICTIONS = (
    Restriction(
        "torchao",
        classes=("torchao.utils.TorchAOBaseTensor",),
        refused={"merge": f"torchao stores its weights packed, so nothing can be added to them. {_PACKED}"},
        error=TargetError,
    ),
    Restriction(
        "bitsandbytes int8",
        classes=("bitsandbytes.nn.modules.Int8Params",),
        refused={"merge": f"int8 weights are stored packed, and adding to them changes nothing. {_PACKED}"},
    ),
    Restriction(
        "optimum-quanto",
        classes=("optimum.quanto.tensor.qtensor.QTensor",),
        refused={"merge": f"quanto's weights are stored packed, and adding to them changes nothing. {_PACKED}"},
    ),
)


@hookimpl
def tunerkit_restrictions() -> Iterable[Restriction]:
    """Register what is refused."""
    return list(RESTRICTIONS)
