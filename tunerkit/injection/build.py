"""Build what one adapter puts into a model: its slots, with the model only read."""

from itertools import chain

import attrs
import torch
from torch import nn

from tunerkit import hooks
from tunerkit.errors import TargetError
from tunerkit.injection.inject import Plan, copy_base
from tunerkit.injection.preconditions import refuse_overlap
from tunerkit.injection.slots import Slot
from tunerkit.injection.tuner import Tuner
from tunerkit.layers import Adapter, BaseLayer, bias_name
from tunerkit.libraries import execution_device, is_offloaded, torch_private
from tunerkit.records import Target
from tunerkit.targets import Scan, ScannedModule


def build(scanned: Scan, tuner: Tuner) -> Plan:
    """Build every slot of ``tuner``; the model is only read."""
    modules = tuner.modules()
    copied = frozenset(place.path for place in tuner.copies)
    refuse_overlap(tuner.model, modules, copied)
    targeted = {target.path: target for target in tuner.targets}
    biased = {place.path for place in tuner.biases}
    places = {path: scanned.by_path[path] for path in modules}
    slots = {}
    for path, module in modules.items():
        if path in copied:
            slots[path] = Slot(copy=_copy_of(path, module))
            places[path] = attrs.evolve(places[path], base=None)  # replaced whole, by whatever it is
            continue
        built = _adapter(tuner, targeted[path], places[path]) if path in targeted else None
        bias = _bias_of(path, module, bias_name(places[path].base)) if path in biased else None
        slots[path] = Slot(method=tuner.method, adapter=built, bias=bias)
    return Plan(tuner=tuner, slots=slots, places=places)


def _adapter(tuner: Tuner, target: Target, found: ScannedModule) -> Adapter:
    """One adapter from the method's own plugin, moved to its base layer's device and the config's dtype."""
    base = found.base
    if base is None:
        raise TargetError(f"{target.path!r} is a {type(found.module).__name__}: no installed base-layer kind adapts it")
    built = hooks.build_adapter(tuner.method, target, base, tuner.config)
    if found.reader is not None:
        _refuse_unreadable(tuner, target, base)
    return _placed(built, _device_of(target.module), getattr(torch, tuner.config.adapter_dtype))


def _placed(built: Adapter, device: torch.device | None, dtype: torch.dtype) -> Adapter:
    """The adapter at its device and in its dtype. It was built on the CPU, where asking is cheaper than moving it."""
    own = chain(built.parameters(), built.buffers())
    there = device is None or device.type == "cpu"
    there = there and all(t.device.type == "cpu" and (t.dtype == dtype or not t.is_floating_point()) for t in own)
    return built if there else built.to(device=device, dtype=dtype)


def _device_of(module: nn.Module) -> torch.device | None:
    """Where ``module`` runs: its weights may be elsewhere in between."""
    own = chain(module.parameters(recurse=False), module.buffers(recurse=False))
    return execution_device(module) or next((tensor.device for tensor in own), None)


def _copy_of(path: str, module: nn.Module) -> nn.Module:
    for part in module.modules():
        if any(p.is_meta for p in part.parameters(recurse=False)) and not is_offloaded(part):
            raise TargetError(f"{path!r} has weights on the meta device and cannot be copied; load the weights first")
    return copy_base(module)


def _bias_of(path: str, module: nn.Module, name: str) -> nn.Parameter:
    bias = module.get_parameter(name).detach()
    if is_offloaded(module):
        raise TargetError(
            f"the bias of {path!r} cannot be trained: accelerate offloads it, and training needs it beside its copy at "
            "each forward; set bias='none', or keep the module on a device"
        )
    if bias.is_meta:
        raise TargetError(f"{path!r} has weights on the meta device and cannot be copied; load the weights first")
    return nn.Parameter(bias.clone())


def _refuse_unreadable(tuner: Tuner, target: Target, base: BaseLayer) -> None:
    """Where an owner reads the weight, the method must say what it adds, and the weight must be a plain matrix."""
    if not hooks.has_delta(tuner.method):
        raise TargetError(
            f"{target.path!r} is read past its forward by its owner, so an adapter there works by its delta, and the "
            f"plugin of method {tuner.method!r} does not implement tunerkit_delta; exclude it from the targets"
        )
    weight = torch_private.own_parameters(target.module).get(base.weight_name)
    if weight is None or not weight.is_floating_point():
        raise TargetError(
            f"{target.path!r} is read past its forward by its owner, and its weight is no plain matrix that a delta "
            "can be added to; exclude it from the targets"
        )
