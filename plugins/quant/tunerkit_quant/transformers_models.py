"""Models of transformers that a library has quantised: ordinary ones again, once all their layers are dense."""

from typing import Any

from torch import nn

# transformers' names of the methods, and the packages of the layers or weights that they leave in a model. Other
# quantisers' layers are not recognised, so nothing says that a model is rid of them.
_METHODS = ("bitsandbytes", "torchao", "hqq", "quanto", "gptq")
_PACKAGES = ("bitsandbytes", "torchao", "hqq", "optimum.quanto", "gptqmodel", "auto_gptq")
_MARKS = ("is_loaded_in_4bit", "is_loaded_in_8bit")


def forget_quantisation_(model: Any) -> None:
    """Let transformers save and train a model as any other if no quantised layer is left in it."""
    quantiser = getattr(model, "hf_quantizer", None)
    if quantiser is None or quantiser.quantization_config.quant_method not in _METHODS:
        return
    if not any(map(_is_quantised, model.modules())):
        quantiser.remove_quantization_config(model)
        for mark in _MARKS:
            if hasattr(model, mark):
                setattr(model, mark, False)


def _is_quantised(module: nn.Module) -> bool:
    kinds = [*type(module).__mro__, *(kind for each in module.parameters(recurse=False) for kind in type(each).__mro__)]
    return any(f"{kind.__module__}.".startswith(f"{package}.") for kind in kinds for package in _PACKAGES)
