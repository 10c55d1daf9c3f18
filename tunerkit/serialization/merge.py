"""Merge adapters into their base layers, unmerge them bit for bit, and show the base while adapters stay in."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from tunerkit.errors import AdapterError
from tunerkit.hooks import registry
from tunerkit.injection import (
    Slots,
    Tuner,
    add_delta,
    ask_delta,
    is_merged,
    refuse_disabled,
    refuse_lost,
    require_tuners,
    walk,
)
from tunerkit.layers import Adapter, BaseLayer, bias_name
from tunerkit.libraries import is_offloaded, torch_private
from tunerkit.paths import is_under
from tunerkit.records import Delta
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
    merged = [(module, slots, _merged_tensors(path, module, slots, tuners)) for path, module, slots in walk(model)]
    if permanent:
        for tuner in tuners.values():
            tuner.fingerprint = fingerprint(tuner)
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
    shared = tied(model)
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
def _merged_tensors(path: str, module: nn.Module, slots: Slots, tuners: dict[str, Tuner]) -> dict[str, Tensor]:
    """The values that ``module``'s own tensors have with all active slots merged."""
    tensors: dict[str, Tensor] = {}
    for name in slots.active:
        slot = slots.get(name)
        assert slot is not None
        if slot.copy is not None:
            tensors.update({key: tensor.detach().clone() for key, tensor in _own_tensors(slot.copy).items()})
            continue
        if slot.adapter is not None:
            assert slots.base is not None
            delta = _delta(path, module, tuners[name].method, slot.adapter, slots.base)
            add_delta(module, slots.base, delta, tensors)
        if slot.bias is not None:
            bias = bias_name(slots.base)
            own = module.get_parameter(bias)
            added = tensors.get(bias, own).double() + (slot.bias - own).double()
            tensors[bias] = added.to(own.dtype) if bias in tensors else slot.bias.clone()
    return tensors


def _delta(path: str, module: nn.Module, method: str, adapter: Adapter, base: BaseLayer) -> Delta:
    """What an adapter adds, if there is a place for it in its base layer."""
    if not registry.implements("tunerkit_delta", method):
        raise AdapterError(f"method {method!r} cannot be merged: its plugin does not implement tunerkit_delta")
    delta = ask_delta(path, method, adapter, base)
    if delta.bias is not None and torch_private.own_parameters(module).get(base.bias_name) is None:
        raise AdapterError(f"cannot merge into {path!r}: the adapter adds a bias and the base layer has none")
    return delta


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a trained copy by local name: no adapter lies in one."""
    return {name: tensor.detach() for name, tensor in (*module.named_parameters(), *module.named_buffers())}


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
