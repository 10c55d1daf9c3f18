"""Stacks that a quantizer left in full precision, though they are most of a mixture's weights."""

from typing import Any

from torch import nn

from tunerkit.errors import warn
from tunerkit_experts.stacks import PACK, Stack, is_packed


def warn_of_unpacked(model: nn.Module) -> None:
    """Warn of stacks in full precision in a model that transformers quantized as it was loaded.

    bitsandbytes replaces layers, and passes over the parameters of experts modules without a word.
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return
    stacks = [each for each in model.modules() if isinstance(each, Stack)]
    weights = [own for each in stacks if (own := vars(each.owner)["_parameters"].get(each.name)) is not None]
    plain = [weight for weight in weights if not is_packed(weight)]
    if plain:
        size = sum(weight.nbytes for weight in plain) / 2**30
        method = getattr(quantizer.quantization_config.quant_method, "value", "the quantizer")
        warn(f"{method} left {len(plain)} stacks of experts in full precision, which take {size:,.2f} GiB. {PACK}")
