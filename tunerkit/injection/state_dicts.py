"""A model's own ``state_dict``: merged weights are not loaded beside adapters, and nothing into merged weights."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tunerkit import hooks
from tunerkit.injection.delta import adapted_tensors
from tunerkit.injection.slots import MERGED, Slots, mark_merged, walk
from tunerkit.libraries import torch_private
from tunerkit.paths import CHILD, join

_SAMPLES = 16


def watch_states_(model: nn.Module) -> None:
    """Mark the states that are taken of ``model``, and check those that are loaded into it."""
    model.register_state_dict_post_hook(mark_merged)  # type: ignore[no-untyped-call]  # torch's own
    model.register_load_state_dict_pre_hook(refuse_state)  # type: ignore[no-untyped-call]


def unwatch_states_(model: nn.Module) -> None:
    """Undo `watch_states_`."""
    torch_private.remove_state_hooks_(model, mark_merged, refuse_state)


def refuse_state(
    model: nn.Module, state: Mapping[str, Any], prefix: str, metadata: Mapping[str, object], *rest: object
) -> None:
    """Raise `AdapterError` for a state that does not fit the model as it is, merged or not: the model's pre-hook.

    Nothing has been loaded yet. A state that lost its metadata, as in a plain dict or a safetensors file, is
    recognised by its values, if it belongs to the same base.
    """
    places = list(walk(model))
    for path, module, slots in places:
        slots.refuse_state(marked=MERGED in metadata)
        new, own = _weights(path, module, slots, state, prefix)
        if new is not None and own is not None and not _same_samples(new, own):
            slots.refuse_state(marked=_is_sum(path, module, slots, state, prefix))
            return  # the state belongs to another base


def _weights(
    path: str, module: nn.Module, slots: Slots, state: Mapping[str, Any], prefix: str
) -> tuple[Tensor | None, Tensor | None]:
    """Return the weight of a module in the state and the live one; None where they cannot be compared."""
    if slots.base is None or slots.merged or not slots.applied:
        return None, None
    new = state.get(prefix + join(path, slots.base.weight_name))
    own = torch_private.own_parameters(module).get(slots.base.weight_name)
    plain = isinstance(new, Tensor) and own is not None and own.shape == new.shape and own.is_floating_point()
    return (new, own) if plain and not (new.is_meta or own.is_meta) else (None, None)  # type: ignore[union-attr]


def _same_samples(new: Tensor, own: Tensor) -> bool:
    places = torch.linspace(0, own.numel() - 1, _SAMPLES).long()
    return torch.equal(*(torch.take(each.detach(), places.to(each.device)).cpu().float() for each in (new, own)))


@torch.no_grad()
def _is_sum(path: str, module: nn.Module, slots: Slots, state: Mapping[str, Any], prefix: str) -> bool:
    """Whether the module's weight in the state is the live one plus the ΔW of the adapters in the state."""
    new, own = _weights(path, module, slots, state, prefix)
    assert new is not None
    assert own is not None
    assert slots.base is not None
    if not all(slot.adapter is None or hooks.has_delta(slot.method) for slot in slots.applied):
        return False
    start = f"{prefix}{join(path, CHILD)}."
    twin = copy.deepcopy(slots)
    try:
        twin.load_state_dict({key.removeprefix(start): state[key] for key in state if key.startswith(start)})
    except RuntimeError:  # the state has other adapters
        return False
    tensors = adapted_tensors(path, module, twin)
    merged = tensors.get(slots.base.weight_name, own).float()
    change = new.to(own.device).float() - own.float()
    return bool((merged - own.float() - change).norm() <= 1e-2 * change.norm())
