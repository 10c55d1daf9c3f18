"""What an adapter adds to its base layer's own tensors, as the method's plugin says it."""

import torch
from torch import Tensor, nn

from tunerkit.errors import PluginError
from tunerkit.hooks import registry
from tunerkit.layers import Adapter, BaseLayer
from tunerkit.libraries import torch_private
from tunerkit.records import Delta


def ask_delta(path: str, method: str, adapter: Adapter, base: BaseLayer) -> Delta:
    """What the method's own plugin says that its adapter adds, once it has shown to fit the base layer."""
    delta = registry.call("tunerkit_delta", method, adapter=adapter, base=base)
    if not isinstance(delta, Delta):
        raise PluginError(f"{plugin_of(method)} must return a tunerkit.Delta for {path!r}, got {type(delta).__name__}")
    features = (base.out_features, base.in_features)
    for what, tensor, shape in (("weight", delta.weight, features), ("bias", delta.bias, features[:1])):
        # Broadcasting would take a row for a matrix, and add something else than was meant.
        if tensor is not None and tuple(tensor.shape) != shape:
            got = tuple(tensor.shape)
            raise PluginError(f"{plugin_of(method)} gave a delta {what} of shape {got} for {path!r}, expected {shape}")
    return delta


def add_delta(module: nn.Module, base: BaseLayer, delta: Delta, tensors: dict[str, Tensor]) -> None:
    """Add ``delta`` to ``tensors``, which hold by name what stands in place of the module's own; none is written to.

    A bias that the module lacks counts as zeros.
    """
    if delta.weight is not None:
        own = _own(module, base.weight_name)
        packed = base.pack(delta.weight)
        wide = torch.promote_types(packed.dtype, torch.promote_types(own.dtype, torch.float32))
        tensors[base.weight_name] = (tensors.get(base.weight_name, own).to(wide) + packed.to(wide)).to(own.dtype)
    if delta.bias is not None:
        before = tensors.get(base.bias_name, torch_private.own_parameters(module).get(base.bias_name))
        if before is None:
            before = torch.zeros_like(delta.bias, dtype=_own(module, base.weight_name).dtype)
        tensors[base.bias_name] = before + delta.bias.to(before.dtype)


def _own(module: nn.Module, name: str) -> nn.Parameter:
    """The module's parameter itself, also while an override stands in front of it."""
    own = torch_private.own_parameters(module)[name]
    assert own is not None
    return own


def plugin_of(method: str) -> str:
    """How errors name the plugin that owns ``method``."""
    return f"the plugin of method {method!r} ({registry.owner_of(method).distribution})"
