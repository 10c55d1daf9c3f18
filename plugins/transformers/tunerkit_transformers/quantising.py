"""Quantize base models of transformers at loading, with bitsandbytes, to int8 or nf4."""

import importlib.util
import math
from collections.abc import Iterator, Sequence
from typing import Any, Final

import attrs
import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from tunerkit.errors import TunerkitError, closest
from tunerkit.plugin.trainers import is_named, lacking

QUANTISATIONS: Final = ("nf4", "int8")


class QuantisationError(TunerkitError):
    """A quantization is unknown, or bitsandbytes is not installed."""


def quantising(name: str, dtype: torch.dtype | str, heads: Sequence[str] = ()) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that quantize a model.

    Args:
        name: One of `QUANTISATIONS`.
        dtype: The dtype of the base's other weights, in which 4-bit layers multiply.
        heads: The paths of a classifier's head, which is not quantized, since it is trained in full. None for language
            models: transformers itself leaves out their output embeddings.

    Raises:
        QuantisationError: There is no such name, or bitsandbytes is not installed.
    """
    if name not in QUANTISATIONS:
        raise QuantisationError(
            f"quantisation: there is no {name!r}{closest(name, QUANTISATIONS)}; there are {', '.join(QUANTISATIONS)}"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        absent = lacking("adapts its layers", "quant")
        raise QuantisationError(
            f"quantisation: {name} needs bitsandbytes (pip install bitsandbytes){f'. {absent}' if absent else ''}"
        )
    from transformers import BitsAndBytesConfig

    kept: dict[str, Any] = {"llm_int8_skip_modules": list(heads)} if heads else {}
    if name == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, **kept)}
    compute = getattr(torch, dtype, torch.bfloat16) if isinstance(dtype, str) else dtype
    four: dict[str, Any] = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return {
        "quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute, **four, **kept)
    }


def stacks_in(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yield the owner, the name and the weight of each stack of experts in full precision: (E, out, in), or turned."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if name.endswith("_proj") and weight.ndim == 3 and weight.is_floating_point() and weight.itemsize > 1:
                yield module, name, weight


def pack_stacks_(model: nn.Module) -> None:
    """Quantize a model's stacks of experts to nf4, which transformers leaves in full precision as it loads the model.

    Raises:
        QuantisationError: bitsandbytes is older than 0.50, and the model has stacks.
    """
    for module, name, _ in list(stacks_in(model)):
        try:
            from bitsandbytes.nn.parametrize import replace_parameter_4bit
        except ImportError:
            raise QuantisationError("quantisation: nf4 for experts needs bitsandbytes>=0.50: upgrade it") from None
        replace_parameter_4bit(module, name, quant_type="nf4", compress_statistics=True)


@attrs.frozen
class Sizes:
    """Bytes of a model's tensors: ``own``, and those that its quantized weights would take in its dtype.

    Attributes:
        own: What all its tensors take.
        dense: What they would take if the quantized weights were dense.
        stacks: The number of quantized stacks of experts.
        saved: What quantizing these saves; it is a part of ``dense - own``.
    """

    own: int
    dense: int
    stacks: int
    saved: int

    def __str__(self) -> str:
        stacks = f"; {self.stacks} stacks of experts are packed too, which saves {self.saved / 2**30:,.2f} GiB"
        return f"{self.own / 2**20:,.0f} MiB instead of {self.dense / 2**20:,.0f}{stacks * bool(self.stacks)}"


def sizes_of(model: nn.Module) -> Sizes:
    """Return the sizes of a model that bitsandbytes has quantized."""
    own = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    width = next((p.dtype.itemsize for p in model.parameters() if p.is_floating_point()), 4)
    layers, stacks = 0, []
    for module in model.modules():
        if isinstance(module, nn.Linear) and is_named(type(module), "bitsandbytes."):
            packed = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            layers += module.out_features * module.in_features * width - sum(tensor.nbytes for tensor in packed)
        elif isinstance(module, ParametrizationList) and is_named(type(module[0]), "bitsandbytes."):
            state: Any = module[0].quant_state
            stacks.append(math.prod(state.shape) * state.dtype.itemsize - module.original.nbytes)
    return Sizes(own, own + layers + sum(stacks), len(stacks), sum(stacks))
