"""Quantised layers and packed weights, recognised without importing the library that made them."""

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


def quantiser_of(module: nn.Module) -> str | None:
    """The library that quantised ``module``, in words; None if it is none of those known here."""
    owners = [forward_owner(module), *(type(own) for own in own_parameters(module).values() if is_packed(own))]
    owners.append(type(module))  # a forward on the instance hides the owner
    for owner in owners:
        for package, name in _LIBRARIES.items():
            if f"{owner.__module__}.".startswith(f"{package}."):
                return name
    return None
