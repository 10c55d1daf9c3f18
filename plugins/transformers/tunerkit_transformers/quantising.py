"""Quantize base models of transformers at loading, with bitsandbytes, to int8 or nf4."""

import importlib.util
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import nn

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


def bytes_of(model: nn.Module) -> tuple[int, int]:
    """Return the bytes of a model's tensors, and the bytes if its quantized weights were dense, in its dtype."""
    own = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    width = next((p.dtype.itemsize for p in model.parameters() if p.is_floating_point()), 4)
    dense = own
    for module in model.modules():
        if isinstance(module, nn.Linear) and is_named(type(module), "bitsandbytes."):
            packed = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            dense += module.out_features * module.in_features * width - sum(tensor.nbytes for tensor in packed)
    return own, dense
