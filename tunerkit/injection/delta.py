"""A module's own tensors with its adapters applied, for merging and for temporary weight overrides."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tunerkit import hooks
from tunerkit.errors import AdapterError, PluginError
from tunerkit.injection.slots import Slots
from tunerkit.layers import Adapter, BaseLayer, bias_name, torch_private
from tunerkit.records import Delta


def adapted_tensors(path: str, module: nn.Module, slots: Slots, base: BaseLayer | None = None) -> dict[str, Any]:
    """Compute the parameters and buffers of ``module`` with all active slots applied.

    Args:
        path: The module's name in errors.
        module: The adapted module; it is only read.
        slots: Its slots.
        base: ``module`` as a base layer; by default that of the slots. Another one gets the same deltas.

    Returns:
        New tensors by their local name, in the dtypes of the module's own. Tensors that no slot changes are missing. A
        bias that the module lacks counts as zeros. With gradients on, they depend on the adapters' parameters. Of a
        packed weight they are the attributes that hold it.

    Raises:
        AdapterError: The kind cannot write a packed weight, or the sum contains NaN or inf.
        PluginError: A plugin returns no delta, one of another shape, or one without the gradient that is needed.
    """
    tensors: dict[str, Any] = {}
    deltas: list[Delta] = []
    base = slots.base if base is None else base
    for slot in slots.applied:
        if slot.copy is not None:
            own = (*slot.copy.named_parameters(), *slot.copy.named_buffers())
            tensors.update({key: tensor.detach().clone() for key, tensor in own})
        elif slot.adapter is not None:
            assert slots.base is not None
            deltas.append(hooks.delta(path, slot.method, slot.adapter, slots.base))
            _refuse_untrainable(slot.method, slot.adapter, deltas[-1])
    if deltas:
        assert base is not None
        try:
            tensors |= _with_deltas(base, deltas)
        except AdapterError as error:
            raise AdapterError(f"cannot merge into {path!r}: {error}") from error
    for slot in slots.applied:
        if slot.copy is None and slot.bias is not None:
            _add_bias(module, bias_name(base), slot.bias, tensors)
    return tensors


def refuse_without_delta(slots: Slots) -> None:
    """Raise `AdapterError` if the method of an active adapter cannot say what it adds to the weight."""
    for slot in slots.applied:
        if slot.adapter is not None and not hooks.has_delta(slot.method):
            raise AdapterError(
                f"method {slot.method!r} cannot be merged: its plugin implements neither tunerkit_delta nor "
                "tunerkit_factors"
            )


def _with_deltas(base: BaseLayer, deltas: Sequence[Delta]) -> dict[str, Any]:
    """Add the sums of the deltas to the base layer's weight and bias, so that each is rounded once."""
    weights = [delta.weight for delta in deltas if delta.weight is not None]
    if base.packing is not None:  # where nothing is added, as at rank 0, storing W again would still round it
        weights = [weight for weight in weights if weight.any()]
    biases = [delta.bias for delta in deltas if delta.bias is not None]
    tensors = base.merged(_sum(weights)) if weights else {}
    if biases:
        before: Tensor | None = torch_private.own_parameters(base.module).get(base.bias_name)
        if before is None:
            before = torch.zeros_like(biases[0], dtype=base.tensor(base.weight_name).dtype)
        tensors[base.bias_name] = before + _sum(biases).to(before.dtype)
    return tensors


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        wide = torch.promote_types(torch.promote_types(total.dtype, part.dtype), torch.float32)
        total = total.to(wide) + part.to(wide)
    return total


def _add_bias(module: nn.Module, name: str, trained: Tensor, tensors: dict[str, Any]) -> None:
    """Replace the module's own bias with the trained one. If other slots changed it, add the difference to theirs."""
    own = cast(nn.Parameter, torch_private.own_parameters(module)[name])
    if name in tensors:
        wide = torch.promote_types(own.dtype, torch.float32)
        tensors[name] = (tensors[name].to(wide) + (trained - own).to(wide)).to(own.dtype)
    else:
        tensors[name] = trained.clone()


def _refuse_untrainable(method: str, adapter: Adapter, delta: Delta) -> None:
    """Reject a delta that is detached from the adapter's parameters: it would be used, but never trained."""
    trained = any(parameter.requires_grad and parameter.numel() for parameter in adapter.parameters())
    has_gradient = any(part is not None and part.requires_grad for part in (delta.weight, delta.bias))
    if torch.is_grad_enabled() and trained and not has_gradient:
        raise PluginError(
            f"{hooks.registry.plugin_of(method)} returns tensors from tunerkit_delta that have no gradient, so the "
            "adapter would not be trained where only its delta is used; compute the delta from the parameters, not "
            "detached"
        )
