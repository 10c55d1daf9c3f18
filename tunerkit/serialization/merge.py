"""Merge adapters into their base layers, unmerge them bit for bit, and show the base while adapters stay in."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from tunerkit import hooks
from tunerkit.errors import AdapterError
from tunerkit.injection import (
    Slots,
    adapted_tensors,
    base_modules,
    is_merged,
    refuse_disabled,
    refuse_lost,
    require_tuners,
    walk,
)
from tunerkit.libraries import is_offloaded, torch_private
from tunerkit.paths import is_under
from tunerkit.serialization.fingerprint import fingerprint
from tunerkit.targets import tied

M = TypeVar("M", bound=nn.Module)


def merge(model: M, *, permanent: bool = False) -> M:
    """Add every active adapter to its base layer's weights, in place; forward then costs what the base's costs.

    The originals are set aside (the adapted weights take twice their memory), so that `unmerge` is bit-exact;
    ``permanent`` keeps none. While merged, `disabled` shows the base, saving works, a step raises.
    The model's own ``state_dict()`` then holds merged weights and the adapters beside them: take it unmerged, or
    after ``unwrap(model, keep_merged=True)``.

    Raises `AdapterError` if already merged, inside `disabled`, if none is active, if weights are offloaded, if
    adapted modules were replaced, resized or tied after wrapping, or if a method cannot say what it adds, and
    `PluginError` if it says nonsense; nothing is changed then.
    """
    tuners = require_tuners(model)
    refuse_disabled(model)
    if is_merged(model):
        raise AdapterError("the model is merged already; call tunerkit.unmerge first")
    if not any(slots.active for _, _, slots in walk(model)):
        raise AdapterError("no adapter is active, so nothing can be merged; call tunerkit.activate first")
    _refuse_offloaded(model)
    refuse_lost(tuners.values())
    _refuse_tied(model)
    merged = [(module, slots, _merged_tensors(path, module, slots)) for path, module, slots in walk(model)]
    if permanent:
        for tuner in tuners.values():
            tuner.progress.fingerprint = fingerprint(tuner)
    for module, slots, tensors in merged:
        slots.merged = slots.active
        slots.permanent = permanent
        if permanent:
            _replace(module, tensors)
        else:
            slots.set_aside(_replace(module, tensors))
    return model


def unmerge(model: M) -> M:
    """Put the originals back, bit for bit. Raises `AdapterError` if the model is not merged or no original is left."""
    require_tuners(model)
    refuse_disabled(model)
    if not is_merged(model):
        raise AdapterError("the model is not merged; there is nothing to unmerge")
    restore_originals_(model)
    return model


def restore_originals_(model: nn.Module) -> None:
    """Undo a merge if there is one."""
    places = [(module, slots) for _, module, slots in walk(model) if slots.merged]
    _refuse_permanent([slots for _, slots in places])
    for module, slots in places:
        _replace(module, slots.originals)
        slots.forget_originals()
        slots.merged = ()


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Show the base inside the ``with`` block: adapters off, trained copies and biases off, merged weights swapped."""
    require_tuners(model)
    places = [(module, slots) for _, module, slots in walk(model) if slots.enabled]
    _refuse_permanent([slots for _, slots in places if slots.merged])
    for module, slots in places:
        slots.enabled = False
        _swap(module, slots)
    try:
        yield
    finally:
        for module, slots in places:
            _swap(module, slots)
            slots.enabled = True


def _refuse_offloaded(model: nn.Module) -> None:
    """Weights that are brought for each forward have no place where a merged value would stay."""
    away = [path for path, module, _ in walk(model) if is_offloaded(module)]
    if away:
        raise AdapterError(
            f"accelerate offloads the weights of {len(away)} adapted layers ({away[0]}, ...), so nothing can be merged "
            "into them; call accelerate.hooks.remove_hook_from_submodules(model), which loads them, and then merge"
        )


def _refuse_tied(model: nn.Module) -> None:
    """Wrapping refuses tied weights, but they may be tied by now: merging would change what shares them too."""
    shared = tied(base_modules(model))
    for path, module, slots in walk(model):
        names = [name for p in module.parameters() for name in shared.get(id(p), ()) if not is_under(name, (path,))]
        if slots.active and names:
            raise AdapterError(
                f"cannot merge into {path!r}: it is tied to {', '.join(names)} by now, and merging would change that "
                "too; give each a parameter of its own first"
            )


# Not in inference mode, whoever merges: a base made of inference tensors could neither be trained nor thawed again.
@torch.inference_mode(False)
@torch.no_grad()
def _merged_tensors(path: str, module: nn.Module, slots: Slots) -> dict[str, Tensor]:
    """The values that ``module``'s own tensors have with all active slots merged, if there is a place for them."""
    for slot in slots.applied:
        if slot.adapter is not None and not hooks.has_delta(slot.method):
            raise AdapterError(f"method {slot.method!r} cannot be merged: its plugin does not implement tunerkit_delta")
    tensors = adapted_tensors(path, module, slots)
    bias = None if slots.base is None else slots.base.bias_name
    if bias in tensors and torch_private.own_parameters(module).get(bias) is None:
        raise AdapterError(f"cannot merge into {path!r}: the adapter adds a bias and the base layer has none")
    return tensors


def _replace(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the module's tensors other storage, the Parameter objects staying the same; what they had before."""
    before = {}
    for name, tensor in tensors.items():
        owner_path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_path)
        own = dict((*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)))
        live = own[leaf]
        before[name] = live.data
        live.data = tensor
    return before


def _swap(module: nn.Module, slots: Slots) -> None:
    """Exchange merged and original values."""
    if slots.merged:
        slots.set_aside(_replace(module, slots.originals))


def _refuse_permanent(merged: list[Slots]) -> None:
    if any(slots.permanent for slots in merged):
        raise AdapterError(
            "the model was merged with permanent=True, which kept no originals; the base cannot be shown again. "
            "Use tunerkit.unwrap(model, keep_merged=True) to take the adapters out, or load the base model again"
        )
