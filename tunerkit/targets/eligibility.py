"""What stands in the way of adapting the module at a place, in words that end a sentence about its path."""

from torch import nn

from tunerkit.libraries import is_offloaded, read_children, torch_private
from tunerkit.targets.scan import Place, Survey

_ATTENTION = "nn.MultiheadAttention with a forward of its own may do anything with its weights: it cannot be adapted"
_SEPARATE = "nn.MultiheadAttention with kdim or vdim has three weights in place of one, which cannot be adapted yet"
_READ_AND_CALLED = "is held by several modules, and one reads its weight past its forward: an adapter would reach one"
_READ_AND_AWAY = (
    "is offloaded, and its weight is read past its forward, so there is nothing that a delta could be added to"
)


def obstacle_at(place: Place, scanned: Survey, *, adaptable: bool) -> str | None:
    """Why the module at ``place`` cannot be a target, or None; ``adaptable``: whether a base-layer kind matches it."""
    if isinstance(place.module, nn.MultiheadAttention) and not adaptable:
        return _SEPARATE if read_children(place.module) else _ATTENTION
    if not adaptable and not place.inside_attention:
        return f"is a {type(place.module).__name__}, which cannot be adapted"
    return weight_obstacle(place, scanned)


def weight_obstacle(place: Place, scanned: Survey) -> str | None:
    """Why the weight at ``place`` cannot have an adapter beside it, or None."""
    if place.inside_attention:
        return _ATTENTION
    if place.read_and_called:
        return _READ_AND_CALLED
    if is_offloaded(place.module) and (place.is_read or isinstance(place.module, nn.MultiheadAttention)):
        return _READ_AND_AWAY
    own, parameters = torch_private.own_parameters(place.module), list(place.module.parameters(recurse=False))
    usual = isinstance(place.module, nn.Linear | nn.Embedding) or torch_private.is_convolution(place.module)
    if usual and "weight" not in own:
        return "has a weight computed from others (a parametrization), which cannot be adapted yet"
    if any(parameter.is_meta for parameter in parameters) and not is_offloaded(place.module):
        return "has its weight on the meta device; load the weights first"
    if any(parameter.is_complex() for parameter in parameters):
        return "has complex weights, which cannot be adapted yet"
    shared = [name for parameter in parameters for name in scanned.sharers.get(id(parameter), ())]
    if shared:
        return f"has a tied weight, shared as {', '.join(shared)}: an adapter on one would be missing on the others"
    if isinstance(place.module, nn.Embedding) and place.module.max_norm is not None:
        return "has max_norm set, so its forward rewrites its weight; build it without max_norm"
    return None
