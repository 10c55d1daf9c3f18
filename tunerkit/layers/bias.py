"""Trained biases: which modules have one, under which name, and in which shape it is added."""

from torch import Tensor, nn

from tunerkit.layers.base import BaseLayer
from tunerkit.libraries import overrides_forward

# Those that add their bias along the last dimensions, and those that add it along the channels.
_TRAILING = (nn.LayerNorm,)
_CHANNELS = (nn.modules.batchnorm._BatchNorm, nn.SyncBatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)


def has_trainable_bias(module: nn.Module, base: BaseLayer | None) -> bool:
    """Whether `view_bias` knows how ``module`` adds its bias (and there is one)."""
    # As strict as base-layer kinds are: a norm with a forward of its own may put its channels anywhere.
    own_forward = overrides_forward(module) or type(module).forward not in {
        kind.forward for kind in (*_TRAILING, *_CHANNELS)
    }
    name = bias_name(base)
    return (base is not None or not own_forward) and isinstance(module._parameters.get(name), nn.Parameter)


def bias_name(base: BaseLayer | None) -> str:
    """The local name of a module's bias; a norm has no kind."""
    return "bias" if base is None else base.bias_name


def view_bias(module: nn.Module, base: BaseLayer | None, bias: Tensor, y: Tensor) -> Tensor:
    """``bias`` (out,) in a shape that broadcasts over the output ``y`` as the module's own bias does."""
    if base is not None:
        return base.shape_bias(bias)
    if isinstance(module, _TRAILING):
        return bias
    # Instance norm alone takes inputs without a batch dimension.
    batched = not isinstance(module, nn.modules.instancenorm._InstanceNorm) or y.dim() > module._get_no_batch_dim()
    return bias.view(-1, *[1] * (y.dim() - 1 - batched))
