"""Trained biases: which modules have one, under which name, and in which shape it is added."""

from torch import Tensor, nn

from tunerkit.layers.base import BaseLayer
from tunerkit.libraries import overrides_forward, torch_private

# Those that add their bias along the last dimensions.
_TRAILING = (nn.LayerNorm,)


def has_trainable_bias(module: nn.Module, base: BaseLayer | None) -> bool:
    """Whether `view_bias` knows how ``module`` adds its bias (and there is one)."""
    # As strict as base-layer kinds are: a norm with a forward of its own may put its channels anywhere.
    norms: tuple[type[nn.Module], ...] = (*_TRAILING, *torch_private.channel_norms())
    own_forward = overrides_forward(module) or type(module).forward not in {norm.forward for norm in norms}
    name = bias_name(base)
    return (base is not None or not own_forward) and torch_private.own_parameters(module).get(name) is not None


def bias_name(base: BaseLayer | None) -> str:
    """The local name of a module's bias; a norm has no kind."""
    return "bias" if base is None else base.bias_name


def view_bias(module: nn.Module, base: BaseLayer | None, bias: Tensor, y: Tensor) -> Tensor:
    """``bias`` (out,) in a shape that broadcasts over the output ``y`` as the module's own bias does."""
    if base is not None:
        return base.shape_bias(bias)
    if isinstance(module, _TRAILING):
        return bias
    return bias.view(-1, *[1] * (y.dim() - 1 - torch_private.is_batched(module, y)))
