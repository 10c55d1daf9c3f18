"""Trained biases: which modules have one, its name, and the shape in which it is added."""

from torch import Tensor, nn

from tunerkit.layers.base import BaseLayer
from tunerkit.libraries import overrides_forward, torch_private


def has_trainable_bias(module: nn.Module, base: BaseLayer | None) -> bool:
    """Whether ``module`` has a bias and `view_bias` can shape it."""
    # As strict as base-layer kinds: a norm with its own forward may put its channels anywhere.
    norms: tuple[type[nn.Module], ...] = (nn.LayerNorm, *torch_private.channel_norms())
    own_forward = overrides_forward(module) or type(module).forward not in {norm.forward for norm in norms}
    name = bias_name(base)
    return (base is not None or not own_forward) and torch_private.own_parameters(module).get(name) is not None


def bias_name(base: BaseLayer | None) -> str:
    """The local name of a module's bias; norms have no base-layer kind."""
    return "bias" if base is None else base.bias_name


def view_bias(module: nn.Module, base: BaseLayer | None, bias: Tensor, y: Tensor) -> Tensor:
    """``bias`` (out,) in a shape that broadcasts over the output ``y`` as the module's own bias does."""
    if base is not None and base.has_weight:
        return base.shape_bias(bias)
    if isinstance(module, nn.LayerNorm):  # the only norm here that adds its bias along the last dimensions
        return bias
    return bias.view(-1, *[1] * (y.dim() - 1 - torch_private.is_batched(module, y)))
