"""Hooks of a model's own ``state_dict``: unmerged models reject merged states, and merged models reject all states."""

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tunerkit import hooks
from tunerkit.errors import AdapterError, TunerkitWarning
from tunerkit.injection.delta import adapted_tensors
from tunerkit.injection.slots import Slots, walk
from tunerkit.injection.tuner import wrapped_of
from tunerkit.layers import numbers_of, torch_private
from tunerkit.paths import CHILD, join

# The key in the metadata of a state dict with merged weights.
_MERGED = "tunerkit.merged"
_SAMPLES = 16


def mark_merged(module: nn.Module, state: object, prefix: str, metadata: dict[str, Any]) -> None:
    """Hook after ``state_dict()``: mark the metadata if weights are merged and not `disabled`; keys do not change."""
    if any(slots.merged and slots.enabled for _, _, slots in walk(module)):
        metadata[_MERGED] = True


def refuse_state(
    module: nn.Module, state: Mapping[str, Any], prefix: str, metadata: Mapping[str, object], *rest: object
) -> None:
    """Pre-hook of ``load_state_dict``: raise `AdapterError` if the state dict or the module has merged weights.

    Nothing is loaded into the module then. A merged state dict without metadata, such as a plain dict or one from a
    safetensors file, is recognized by its values, if it is from the same base.
    """
    marked, found = _MERGED in metadata, None
    places = walk(module)
    for path, part, slots in places:
        if slots.permanent:  # even without an active adapter
            continue
        start = prefix + join(path, "")
        if slots.merged:
            own = dict(part.named_parameters())
            names = [name for name in slots.originals if name in own and start + name in state]
            if not all(_is_equal(own[name], state[start + name]) for name in names):
                raise AdapterError(_LOST)
        elif marked:
            raise AdapterError(_TWICE)
        elif found is None:  # one differing weight is enough: it is merged, or from another base
            found = _has_sum(path, part, slots, state, start)
            if found:
                raise AdapterError(_TWICE)
    # After a permanent merge there is no unmerge, so nothing can be lost. One warning for the whole model.
    if not marked and any(slots.permanent for _, _, slots in places) and wrapped_of(module).tuners:
        warnings.warn(_UNKNOWN, TunerkitWarning, stacklevel=4)


def _is_equal(live: Tensor, new: Tensor) -> bool:
    """Whether two tensors, plain or packed, have the same values."""
    pairs = zip(numbers_of(live), numbers_of(new), strict=False)
    return new.shape == live.shape and all(a.shape == b.shape and torch.equal(a, b.to(a)) for a, b in pairs)


@torch.no_grad()
def _has_sum(path: str, part: nn.Module, slots: Slots, state: Mapping[str, Any], start: str) -> bool | None:
    """Whether the state dict's weight of a module equals the live weight plus the ΔW of the state dict's adapters.

    None if sampled values equal the live weight, or if weights cannot be compared: shards, packed or meta tensors.
    """
    if slots.base is None or not slots.applied:
        return None
    new: Any = state.get(start + slots.base.weight_name)
    own = torch_private.own_parameters(part).get(slots.base.weight_name)
    if type(own) is not nn.Parameter or type(new) not in (Tensor, nn.Parameter) or new.shape != own.shape:
        return None
    if not own.numel() or not own.is_floating_point() or new.is_meta or own.is_meta:
        return None
    places = torch.linspace(0, own.numel() - 1, _SAMPLES).long()
    if torch.equal(*(torch.take(each, places.to(each.device)).cpu().float() for each in (new, own))):
        return None
    if not all(slot.adapter is None or hooks.has_delta(slot.method) for slot in slots.applied):
        return False
    twin, inside = copy.deepcopy(slots), f"{start}{CHILD}."
    try:
        twin.load_state_dict({key.removeprefix(inside): state[key] for key in state if key.startswith(inside)})
    except RuntimeError:  # the state has other adapters
        return False
    merged = adapted_tensors(path, part, twin).get(slots.base.weight_name, own).float()
    change = new.to(own.device).float() - own.float()
    missing, size = (merged - own.float() - change).norm(), change.norm()
    return bool(size.isfinite() and missing <= 1e-2 * size)  # uninitialized weights may have any values


_LOST = (
    "the model is merged, and unmerging would overwrite the values that load_state_dict writes; call tunerkit.unmerge "
    "first"
)
_UNKNOWN = (
    "the model was merged with permanent=True, and nothing shows whether this state_dict has merged weights: only the "
    "original object from state_dict() is marked. If it has the base's weights, the adapters have no effect from now on"
)
_TWICE = (
    "this state_dict was taken while adapters were merged into the weights, so the adapters would be applied twice "
    "here. Take the state_dict after tunerkit.unmerge(model); or take the merged weights after tunerkit.unwrap(model, "
    "keep_merged=True), and load them into a model without adapters"
)
