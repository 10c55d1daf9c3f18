"""What prevents a module from being adapted, as the end of a sentence about its path."""

from collections.abc import Collection

from torch import nn

from tunerkit.libraries import (
    forward_owner,
    is_offloaded,
    quantiser_of,
    runs_forward_of_library,
    torch_private,
    whole_shape,
)
from tunerkit.paths import join
from tunerkit.targets.scan import Scan, ScannedModule
from tunerkit.targets.ties import left_out, way_out

_ATTENTION = "nn.MultiheadAttention with a forward of its own may use its weights in any way, so it cannot be adapted"
_SEPARATE = "nn.MultiheadAttention with kdim or vdim has three weights instead of one, which cannot be adapted yet"
_NOT_CALLED = "is used directly by its owner, bypassing its forward(): it has no output of its own"
_READ_AND_CALLED = "is held by several modules, one of which bypasses its forward(): an adapter would not reach all"
_READ_AND_OFFLOADED = "is offloaded, and its weight is used directly, bypassing its forward(): it cannot be overridden"


def obstacle_at(found: ScannedModule, scanned: Scan, others: Collection[str] = ()) -> str | None:
    """Why the module cannot be a target beside the targets at the paths ``others``, or None."""
    if found.base is None and isinstance(found.module, nn.MultiheadAttention):
        return _SEPARATE if forward_owner(found.module) is nn.MultiheadAttention else _ATTENTION
    if found.base is None and not found.inside_attention:
        return _without_kind(found.module)
    return weight_obstacle(found, scanned, others)


def _without_kind(module: nn.Module) -> str:
    name, quantiser = type(module).__name__, quantiser_of(module)
    if quantiser is None:
        return f"is a {name}, which cannot be adapted"
    if not runs_forward_of_library(module):
        return (
            f"is a {name} that {quantiser} has quantised, with a forward of its own, which may use the packed weight "
            "in any way: take that forward away, or exclude the layer from the targets"
        )
    return (
        f"is a {name} that {quantiser} has quantised, and no installed base-layer kind adapts it: install "
        "tunerkit-quant, or a version of it that does, or load the model without quantising it"
    )


def output_obstacle(found: ScannedModule) -> str | None:
    """Why a method that adapts outputs cannot adapt the module, or None."""
    if found.inside_attention or found.reader is not None:
        return _NOT_CALLED
    if isinstance(found.module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
        return f"is a {type(found.module).__name__}, which is never called: it has no output"
    if isinstance(found.module, nn.Sequential):
        return "is an nn.Sequential, which runs every child, so also an adapter; name the last layer in it instead"
    return None


def weight_obstacle(found: ScannedModule, scanned: Scan, others: Collection[str] = ()) -> str | None:
    """Why the module's weight cannot be adapted beside the targets at the paths ``others``, or None."""
    module = found.module
    if found.inside_attention:
        return _ATTENTION
    if found.read_and_called:
        return _READ_AND_CALLED
    if found.base is not None and (obstacle := found.base.obstacle()) is not None:
        return obstacle
    if (found.reading_owner is not None or isinstance(module, nn.MultiheadAttention)) and is_offloaded(module):
        return _READ_AND_OFFLOADED
    own = torch_private.own_parameters(module)
    parameters = [parameter for parameter in own.values() if parameter is not None]
    usual = isinstance(module, nn.Linear | nn.Embedding) or torch_private.is_convolution(module)
    if usual and "weight" not in own:
        return "has a weight computed from others (a parametrization), which cannot be adapted yet"
    if not scanned.unloaded and any(parameter.is_meta for parameter in parameters) and not is_offloaded(module):
        return "has its weight on the meta device; load the weights first"
    if found.base is not None and (weight := own.get(found.base.weight_name)) is not None and 0 in whole_shape(weight):
        return f"has a weight of shape {tuple(whole_shape(weight))}, in which there is nothing to adapt: exclude it"
    if any(parameter.is_complex() for parameter in parameters):
        return "has complex weights, which cannot be adapted yet"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "has max_norm set, so its forward() rewrites its weight; build it without max_norm"
    return _tie(found, scanned, others)


def _tie(found: ScannedModule, scanned: Scan, others: Collection[str]) -> str | None:
    """Why a tied weight of the module cannot be adapted: not all that share it are targets. None if they are."""
    for leaf, parameter in torch_private.own_parameters(found.module).items():
        names = scanned.sharers.get(id(parameter), ())
        if left_out(names, {found.path, *others}):
            way = way_out(scanned, join(found.path, leaf), names, setting="targets")
            return (
                f"has a tied weight, shared as {', '.join(names)}: an adapter on one would not change the others. {way}"
            )
    return None
