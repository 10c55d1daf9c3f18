"""The private names of torch with which a method that is a function finds writes into W, and undoes them."""

from torch import Tensor, nn


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters of ``module`` itself, as the live dict; an attribute of the same name does not hide them."""
    return module._parameters


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that ``module`` itself has, also if it overrides how it lists them."""
    return {name: parameter for name, parameter in own_parameters(module).items() if parameter is not None}


def version(tensor: Tensor) -> int | None:
    """The counter that every in-place change of ``tensor`` increments; None for inference tensors, which have none."""
    return None if tensor.is_inference() else tensor._version
