"""A model's own ``state_dict``: merged weights are not loaded beside adapters, and nothing into merged weights."""

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

# The entry in the metadata of a state with merged weights.
_MERGED = "tunerkit.merged"
_SAMPLES = 16


def watch_states_(module: nn.Module) -> None:
    """Mark the states that are taken of ``module``, a wrapped model or an adapted module, and check those for it."""
    module.register_state_dict_post_hook(mark_merged)
    module.register_load_state_dict_pre_hook(refuse_state)


def unwatch_states_(module: nn.Module) -> None:
    """Undo `watch_states_`."""
    torch_private.remove_state_hooks_(module, mark_merged, refuse_state)


def mark_merged(module: nn.Module, state: object, prefix: str, metadata: dict[str, Any]) -> None:
    """Mark the metadata of a state with merged weights: the post-hook of a watched module. The keys stay as they are.

    Inside `disabled` the weights are the base's.
    """
    if any(slots.merged and slots.enabled for _, _, slots in walk(module)):
        metadata[_MERGED] = True


def refuse_state(
    module: nn.Module, state: Mapping[str, Any], prefix: str, metadata: Mapping[str, object], *rest: object
) -> None:
    """Raise `AdapterError` for a state that does not fit a module as it is, merged or not: its pre-hook.

    Nothing has been loaded into the module yet. A state with merged weights that lost its metadata, as in a plain dict
    or a safetensors file, is recognised by its values, if it belongs to the same base.
    """
    marked, found, unknown = _MERGED in metadata, False, False
    for path, part, slots in walk(module):
        start = prefix + join(path, "")
        if slots.permanent:
            unknown |= not marked  # nothing is lost at unmerge, since there is none
        elif slots.merged:
            own = dict(part.named_parameters())
            both = [(own[n], state[start + n]) for n in slots.originals if n in own and start + n in state]
            if not all(_is_equal(live, new) for live, new in both):
                raise AdapterError(_LOST)
        elif marked:
            raise AdapterError(_TWICE)
        elif not found and (pair := _weights(part, slots, state, start)) and not _same_samples(*pair):
            found = True  # one place is enough: the state is of another base, or merged
            if _is_sum(path, part, slots, state, start, *pair):
                raise AdapterError(_TWICE)
    if unknown and wrapped_of(module).tuners:  # once, for the whole model
        warnings.warn(_UNKNOWN, TunerkitWarning, stacklevel=4)


def _is_equal(live: Tensor, new: Tensor) -> bool:
    """Whether two tensors have the same numbers, also where each is made of other tensors."""
    pairs = zip(numbers_of(live), numbers_of(new), strict=False)
    return new.shape == live.shape and all(a.shape == b.shape and torch.equal(a, b.to(a)) for a, b in pairs)


def _weights(part: nn.Module, slots: Slots, state: Mapping[str, Any], start: str) -> tuple[Tensor, Tensor] | None:
    """Return the weight of a module in the state and the live one; None where they cannot be compared."""
    if slots.base is None or not slots.applied:
        return None
    new: Any = state.get(start + slots.base.weight_name)
    own = torch_private.own_parameters(part).get(slots.base.weight_name)
    if type(own) is not nn.Parameter or type(new) not in (Tensor, nn.Parameter) or new.shape != own.shape:
        return None  # a shard or a packed weight
    readable = own.numel() and own.is_floating_point() and not (new.is_meta or own.is_meta)
    return (new, own) if readable else None


def _same_samples(new: Tensor, own: Tensor) -> bool:
    places = torch.linspace(0, own.numel() - 1, _SAMPLES).long()
    return torch.equal(*(torch.take(each.detach(), places.to(each.device)).cpu().float() for each in (new, own)))


@torch.no_grad()
def _is_sum(
    path: str, part: nn.Module, slots: Slots, state: Mapping[str, Any], start: str, new: Tensor, own: Tensor
) -> bool:
    """Whether the weight in the state is the live one plus the ΔW of the adapters in the state."""
    if not all(slot.adapter is None or hooks.has_delta(slot.method) for slot in slots.applied):
        return False
    start += f"{CHILD}."
    twin = copy.deepcopy(slots)
    try:
        twin.load_state_dict({key.removeprefix(start): state[key] for key in state if key.startswith(start)})
    except RuntimeError:  # the state has other adapters
        return False
    assert slots.base is not None
    merged = adapted_tensors(path, part, twin).get(slots.base.weight_name, own).float()
    change = new.to(own.device).float() - own.float()
    missing, size = (merged - own.float() - change).norm(), change.norm()
    return bool(size.isfinite() and missing <= 1e-2 * size)  # a weight that is to be filled may hold anything


_LOST = (
    "the model is merged, and what load_state_dict writes into merged weights would be lost at unmerge; call "
    "tunerkit.unmerge first"
)
_UNKNOWN = (
    "the model was merged with permanent=True, and it cannot be seen whether this state_dict has merged weights: only "
    "the object that state_dict() returns says so. If it has the base's, the adapters have no effect from now on"
)
_TWICE = (
    "this state_dict was taken while adapters were merged into the weights, and here they would be applied twice. Take "
    "it after tunerkit.unmerge(model), or take the merged weights alone after tunerkit.unwrap(model, keep_merged=True) "
    "and load them into a model without adapters"
)
