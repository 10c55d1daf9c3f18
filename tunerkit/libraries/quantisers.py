"""Quantised layers and packed weights, recognised without importing the library that made them."""

import torch
from torch import Tensor, nn

from tunerkit.libraries.forwards import forward_owner, is_named
from tunerkit.libraries.torch_private import own_parameters

_LIBRARIES = {
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "hqq": "HQQ",
    "optimum.quanto": "optimum-quanto",
    "gptqmodel": "GPTQModel",
    "auto_gptq": "auto-gptq",
    "awq": "AutoAWQ",
}
# The classes that take a tensor apart for torch.compile, and whose values are numbers all the same.
_PLAIN = ("torch.distributed.tensor.DTensor",)
_TAKEN_APART = "__tensor_flatten__"


def is_packed(weight: object) -> bool:
    """Whether a weight is a tensor made of other tensors, such as integers and scales; a shard of one is not."""
    kind = type(weight)
    if kind in (nn.Parameter, Tensor):
        return False
    return hasattr(kind, _TAKEN_APART) and not any(is_named(kind, name) for name in _PLAIN)


def numbers_of(tensor: Tensor) -> list[Tensor]:
    """The tensors that a packed weight is made of, down to plain ones; a plain tensor alone."""
    if not is_packed(tensor):
        return [tensor]
    names, _ = getattr(tensor, _TAKEN_APART)()
    return [inner for name in names for inner in numbers_of(getattr(tensor, name))]


def is_dtype_name(name: str) -> bool:
    """Whether one of torch's dtypes has this name."""
    return isinstance(getattr(torch, name, None), torch.dtype)


def quantiser_of(module: nn.Module) -> str | None:
    """The library that quantised ``module``, in words; None if it is none of those known here."""
    owners = [forward_owner(module), *(type(own) for own in own_parameters(module).values() if is_packed(own))]
    owners.extend(type(module).__mro__)  # a forward on the instance or in a subclass hides the owner
    return next((name for owner in owners if (name := _library_of(owner)) is not None), None)


def runs_forward_of_library(module: nn.Module) -> bool:
    """Whether the forward of a quantised layer is its library's, or torch's where the library packs the weight alone.

    Otherwise it is on the instance or in a subclass, and no kind can know what it does.
    """
    owner = forward_owner(module)
    return _library_of(owner) is not None or owner.__module__.startswith("torch.nn.")


def _library_of(owner: type) -> str | None:
    return next(
        (name for package, name in _LIBRARIES.items() if f"{owner.__module__}.".startswith(f"{package}.")), None
    )
