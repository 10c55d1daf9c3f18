"""A module's own tensors with its adapters applied, for merging and for a temporary weight override."""

import torch
from torch import Tensor, nn

from tunerkit import hooks
from tunerkit.errors import PluginError
from tunerkit.injection.slots import Slot, Slots
from tunerkit.layers import BaseLayer, bias_name
from tunerkit.libraries import torch_private
from tunerkit.records import Delta


def adapted_tensors(path: str, module: nn.Module, slots: Slots) -> dict[str, Tensor]:
    """The parameters and buffers of ``module`` with all active slots applied; those that none changes are missing.

    Args:
        path: What errors call the module.
        module: The adapted module; it is only read.
        slots: Its slots.

    Returns:
        New tensors by their local name, in the dtypes of the module's own. A bias that the module lacks counts as
        zeros. With gradients on they depend on the parameters of the adapters.

    Raises:
        PluginError: A plugin answers with no delta, with one of another shape, or with one that has no gradient where
            one is needed.
    """
    tensors: dict[str, Tensor] = {}
    for name in slots.active:
        slot = slots.get(name)
        assert slot is not None
        if slot.copy is not None:
            own = (*slot.copy.named_parameters(), *slot.copy.named_buffers())
            tensors.update({key: tensor.detach().clone() for key, tensor in own})
            continue
        assert slots.base is not None or slot.adapter is None
        if slot.adapter is not None and slots.base is not None:
            found = hooks.delta(path, slot.method, slot.adapter, slots.base)
            _refuse_untrainable(slot, found)
            _add_delta(module, slots.base, found, tensors)
        if slot.bias is not None:
            _add_bias(module, bias_name(slots.base), slot.bias, tensors)
    return tensors


def _add_delta(module: nn.Module, base: BaseLayer, found: Delta, tensors: dict[str, Tensor]) -> None:
    if found.weight is not None:
        own = _own(module, base.weight_name)
        packed = base.pack(found.weight)
        wide = torch.promote_types(packed.dtype, torch.promote_types(own.dtype, torch.float32))
        tensors[base.weight_name] = (tensors.get(base.weight_name, own).to(wide) + packed.to(wide)).to(own.dtype)
    if found.bias is not None:
        before = tensors.get(base.bias_name, torch_private.own_parameters(module).get(base.bias_name))
        if before is None:
            before = torch.zeros_like(found.bias, dtype=_own(module, base.weight_name).dtype)
        tensors[base.bias_name] = before + found.bias.to(before.dtype)


def _add_bias(module: nn.Module, name: str, trained: Tensor, tensors: dict[str, Tensor]) -> None:
    """Put the trained bias in place of the module's own, or its difference on top of what other slots made of it."""
    own = _own(module, name)
    if name in tensors:
        wide = torch.promote_types(own.dtype, torch.float32)
        tensors[name] = (tensors[name].to(wide) + (trained - own).to(wide)).to(own.dtype)
    else:
        tensors[name] = trained.clone()


def _own(module: nn.Module, name: str) -> nn.Parameter:
    """The module's parameter itself, also while a temporary override stands before it."""
    own = torch_private.own_parameters(module)[name]
    assert own is not None
    return own


def _refuse_untrainable(slot: Slot, found: Delta) -> None:
    """A delta cut off from the adapter's parameters would be used, and never trained."""
    assert slot.adapter is not None
    trained = any(parameter.requires_grad and parameter.numel() for parameter in slot.adapter.parameters())
    has_gradient = any(part is not None and part.requires_grad for part in (found.weight, found.bias))
    if torch.is_grad_enabled() and trained and not has_gradient:
        raise PluginError(
            f"{hooks.registry.plugin_of(slot.method)} answers tunerkit_delta with tensors that have no gradient, so "
            "the adapter would not be trained where only its delta is used; compute the delta from the parameters, "
            "not detached"
        )
