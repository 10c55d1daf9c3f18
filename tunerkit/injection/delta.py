"""Compute a module's tensors with its adapters applied, and check whether an adapter adds anything."""

from collections.abc import Sequence
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor, nn

from tunerkit import hooks
from tunerkit.errors import AdapterError, PluginError
from tunerkit.injection.slots import Slot, Slots, slots_of
from tunerkit.injection.tuner import Tuner, modules_in, slots_in
from tunerkit.layers import Adapter, BaseLayer, bias_name, torch_private
from tunerkit.records import Delta

# --- For merging and for temporary weight overrides ------------------------------------------------------------------


def adapted_tensors(path: str, module: nn.Module, slots: Slots, base: BaseLayer | None = None) -> dict[str, Any]:
    """Return new values of the parameters and buffers of ``module`` that active slots change, by local name.

    The dtypes are the module's own. A missing bias counts as zeros. With gradients on, gradients reach the adapters'
    parameters. For a packed weight, the values are the attributes that store it. For a dense copy of a packed
    module, pass the copy's base layer as ``base``: the deltas of ``slots`` are then added to its weight.
    """
    tensors: dict[str, Any] = {}
    deltas: list[Delta] = []
    base = slots.base if base is None else base
    for slot in slots.applied:
        if slot.copy is not None:
            tensors.update({name: tensor.detach().clone() for name, tensor in _tensors(slot.copy).items()})
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
    name = bias_name(base)
    for trained in (slot.bias for slot in slots.applied if slot.copy is None and slot.bias is not None):
        own = cast(nn.Parameter, torch_private.own_parameters(module)[name])
        # If other slots change the bias too, the trained bias adds its difference from the module's own.
        parts = [tensors[name], trained - own] if name in tensors else [trained]
        tensors[name] = _sum(parts).to(own.dtype, copy=True)
    return tensors


def _with_deltas(base: BaseLayer, deltas: Sequence[Delta]) -> dict[str, Any]:
    """Return the base layer's weight and bias with all deltas added; each sum is rounded once."""
    weights = [delta.weight for delta in deltas if delta.weight is not None]
    if base.packing is not None:  # with ΔW = 0, as at rank 0, quantizing W again would still round it
        weights = [weight for weight in weights if weight.any()]
    biases = [delta.bias for delta in deltas if delta.bias is not None]
    tensors = base.merged(_sum(weights)) if weights else {}
    if biases:
        before: Tensor | None = torch_private.own_parameters(base.holder).get(base.bias_name)
        if before is None:
            before = torch.zeros_like(biases[0], dtype=base.tensor(base.weight_name).dtype)
        tensors[base.bias_name] = before + _sum(biases).to(before.dtype)
    return tensors


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of the tensors, computed in fp32 or a wider dtype."""
    wide = reduce(torch.promote_types, (part.dtype for part in parts), torch.float32)
    return reduce(torch.add, (part.to(wide) for part in parts))


def _refuse_untrainable(method: str, adapter: Adapter, delta: Delta) -> None:
    """Raise `PluginError` if a delta has no gradient, since the adapter's parameters would not be trained."""
    trained = any(parameter.requires_grad and parameter.numel() for parameter in adapter.parameters())
    has_gradient = any(part is not None and part.requires_grad for part in (delta.weight, delta.bias))
    if torch.is_grad_enabled() and trained and not has_gradient:
        raise PluginError(
            f"{hooks.registry.plugin_of(method)} returns tensors without gradients from tunerkit_delta, so the adapter "
            "would not be trained at layers that use only its delta; compute the delta from the parameters, without "
            "detaching them"
        )


# --- Whether anything is added ---------------------------------------------------------------------------------------


@torch.no_grad()
def adds_nothing(tuner: Tuner) -> bool:
    """Whether the adapter leaves the model's output unchanged; checks values, since some loops do not count steps."""
    modules = modules_in(tuner)
    return all(
        _keeps_base(slot, modules[path]) and (slot.adapter is None or _has_no_delta(path, slot, modules[path]))
        for path, slot in slots_in(tuner)
    )


@torch.no_grad()
def is_untrained(tuner: Tuner) -> bool:
    """Whether each adapter of the method has ΔW = 0 and a parameter of zeros; False if there are no adapters."""
    adapted = [(path, slot, slot.adapter) for path, slot in slots_in(tuner) if slot.adapter is not None]
    if not all(any(not parameter.any() for parameter in adapter.parameters()) for _, _, adapter in adapted):
        return False
    modules = modules_in(tuner)
    return bool(adapted) and all(_has_no_delta(path, slot, modules[path]) for path, slot, _ in adapted)


@torch.no_grad()
def untrained_copies(tuner: Tuner) -> list[str]:
    """Return the paths of modules trained in full whose trained copy still has the base's values."""
    modules = modules_in(tuner)
    return [path for path, slot in slots_in(tuner) if slot.copy is not None and _keeps_base(slot, modules[path])]


def _has_no_delta(path: str, slot: Slot, module: nn.Module) -> bool:
    slots = slots_of(module)
    if slots is None or slots.base is None or slot.adapter is None or not hooks.has_delta(slot.method):
        return False
    if hooks.adds_products(slot.method):
        q, p = hooks.factors(path, slot.method, slot.adapter, slots.base)
        for zero, other in ((p, q), (q, p)):
            if not zero.any() and other.isfinite().all():
                return True  # without the cost of a dense matrix
    delta = hooks.delta(path, slot.method, slot.adapter, slots.base)
    return not any(part is not None and bool(part.any()) for part in (delta.weight, delta.bias))


def _keeps_base(slot: Slot, module: nn.Module) -> bool:
    """Whether the slot's copy or bias still equals the base's original values; True if the slot has neither."""
    slots = slots_of(module)
    assert slots is not None
    copied = {} if slot.bias is None else {bias_name(slots.base): slot.bias.data}
    if slot.copy is not None:
        copied = _tensors(slot.copy)
    own = _tensors(module) if copied else {}
    for name, tensor in copied.items():
        original = slots.original(name, own[name]) if name in own else None
        if original is None or original.is_meta or not torch.equal(tensor, original.to(tensor.device)):
            return False
    return True


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
