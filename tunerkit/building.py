"""Build what one adapter puts into a model: its slots, with the model only read."""

import inspect
from collections.abc import Iterator
from itertools import chain

import torch
from torch import nn

from tunerkit import inject, lending, offloading, registry, targets
from tunerkit.adapter import Adapter
from tunerkit.base_layers import BaseLayer
from tunerkit.errors import PluginError, TargetError
from tunerkit.kinds import KINDS, describe
from tunerkit.readers import read_children
from tunerkit.records import Target
from tunerkit.slots import Slot, bias_name, has_trainable_bias
from tunerkit.survey import is_under, join, parent, survey, tied
from tunerkit.tuner import Tuner


def build(tuner: Tuner, kinds: tuple[type[BaseLayer], ...]) -> inject.Plan:
    """Build every slot of ``tuner``; the model is only read."""
    inject.refuse_overlap(tuner.model, tuner.modules(), tuple(place.path for place in tuner.copies))
    bases = {path: describe(module, kinds) for path, module in tuner.modules().items()}
    targeted = {target.path: target for target in tuner.targets}
    biased = {place.path for place in tuner.biases}
    copied = {place.path for place in tuner.copies}
    slots = {}
    for path, module in tuner.modules().items():
        if path in copied:
            slots[path] = Slot(copy=_copy_of(path, module))
            continue
        built = build_adapter(tuner, targeted[path], bases[path]) if path in targeted else None
        bias = _bias_of(path, module, bias_name(bases[path])) if path in biased else None
        slots[path] = Slot(method=tuner.method, adapter=built, bias=bias)
    return inject.Plan(tuner=tuner, slots=slots, bases={p: None if p in copied else base for p, base in bases.items()})


def build_adapter(tuner: Tuner, target: Target, base: BaseLayer | None) -> Adapter:
    """One adapter from the method's own plugin, moved to its base layer's device and the config's dtype."""
    if base is None:
        kind = type(target.module).__name__
        raise TargetError(f"{target.path!r} is a {kind}: no installed base-layer kind adapts it")
    built = registry.call("tunerkit_build_adapter", tuner.method, target=target, base=base, config=tuner.config)
    if not isinstance(built, Adapter):
        raise PluginError(
            f"the plugin of method {tuner.method!r} ({registry.owner_of(tuner.method).distribution}) built "
            f"{type(built).__name__} for {target.path!r}; tunerkit_build_adapter must return a tunerkit.Adapter"
        )
    if target.module in built.modules():
        raise PluginError(
            f"the plugin of method {tuner.method!r} ({registry.owner_of(tuner.method).distribution}) built an adapter "
            f"that holds {target.path!r} as a child; forward is given the base layer, so do not keep it"
        )
    if lending.lender(tuner.model, target.path, base) is not None:
        _refuse_unlendable(tuner, target, base)
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
    return offloading.execution_device(module) or next((tensor.device for tensor in own), None)


def _copy_of(path: str, module: nn.Module) -> nn.Module:
    for part in module.modules():
        if any(p.is_meta for p in part.parameters(recurse=False)) and not offloading.is_offloaded(part):
            raise TargetError(f"{path!r} has weights on the meta device and cannot be copied; load the weights first")
    return inject.copy_base(module)


def _bias_of(path: str, module: nn.Module, name: str) -> nn.Parameter:
    bias = module.get_parameter(name).detach()
    if offloading.is_offloaded(module):
        raise TargetError(
            f"the bias of {path!r} cannot be trained: accelerate offloads it, and training needs it beside its copy at "
            "each forward; set bias='none', or keep the module on a device"
        )
    if bias.is_meta:
        raise TargetError(f"{path!r} has weights on the meta device and cannot be copied; load the weights first")
    return nn.Parameter(bias.clone())


def _refuse_unlendable(tuner: Tuner, target: Target, base: BaseLayer) -> None:
    """Where an owner reads the weight, the method must say what it adds, and the weight must be a plain matrix."""
    if not registry.implements("tunerkit_delta", tuner.method):
        raise TargetError(
            f"{target.path!r} is read past its forward by its owner, so an adapter there works by its delta, and the "
            f"plugin of method {tuner.method!r} does not implement tunerkit_delta; exclude it from the targets"
        )
    weight = target.module._parameters.get(base.weight_name)
    if weight is None or not weight.is_floating_point():
        raise TargetError(
            f"{target.path!r} is read past its forward by its owner, and its weight is no plain matrix that a delta "
            "can be added to; exclude it from the targets"
        )


def choose_copies(model: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """The modules trained in full as copies: those named, and in place of containers what they hold.

    A container runs whatever it holds, or is not run itself: a copy beside its children would be run as one of them.
    """
    found: list[str] = []
    for path in targets.resolve_modules(model, names, what="train_modules"):
        owner = model.get_submodule(parent(path))
        if isinstance(owner, nn.MultiheadAttention) or path.rpartition(".")[2] in read_children(owner):
            raise TargetError(
                f"train_modules: {path!r} is read past its forward by its owner; name the owner {parent(path)!r}"
            )
        leaves = [leaf for leaf, module in _uncontained(path, model.get_submodule(path)) if _has_tensors(module)]
        if not leaves:
            raise TargetError(f"train_modules: {path!r} holds nothing to train; leave it out")
        found += leaves
    return tuple(found)


def _uncontained(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        yield path, module
        return
    if any(parameter is not None for parameter in module._parameters.values()):
        kind = type(module).__name__
        raise TargetError(f"train_modules: {path!r} is a {kind} with parameters of its own; name the modules in it")
    for name, child in module.named_children():
        yield from _uncontained(join(path, name), child)


def _has_tensors(module: nn.Module) -> bool:
    return next(chain(module.parameters(), module.buffers()), None) is not None


def choose_biases(
    model: nn.Module,
    bias: str,
    chosen: tuple[Target, ...],
    copies: tuple[str, ...],
    kinds: tuple[type[BaseLayer], ...],
) -> tuple[Target, ...]:
    """The modules whose bias is trained: none, the targets' own, or all of the model's."""
    if bias == "none":
        return ()
    if bias == "adapters":
        return tuple(t for t in chosen if has_trainable_bias(t.module, describe(t.module, kinds)))
    found, problems = [], []
    shared = tied(model)
    unknown = {id(p.module) for p in survey(model).places if p.inside_attention or p.read_and_called}
    modules = {path: module for path, module in model.named_modules() if not inject.is_adapter_path(path + ".")}
    for path, module in modules.items():
        own = {name: p for name, p in module._parameters.items() if p is not None and "bias" in name}
        if not own or is_under(path, copies):
            continue
        base = describe(module, kinds)
        full = join(path, bias_name(base))
        others = [name for name in shared.get(id(own.get(bias_name(base))), ()) if name != full]
        if others:
            problems.append(f"{full} (tied to {', '.join(others)})")
        elif set(own) == {bias_name(base)} and id(module) not in unknown and has_trainable_bias(module, base):
            found.append(Target(path=path, module=module))
        else:
            problems += [f"{join(path, name)} (of a {type(module).__name__})" for name in own]
    if problems:
        listed = ", ".join(problems)
        raise TargetError(
            f"bias='all' cannot train: {listed}; name their modules in train_modules or set bias='adapters'"
        )
    return tuple(found)


def all_kinds() -> tuple[type[BaseLayer], ...]:
    """Core's strict base-layer kinds, then those of every plugin: nobody can take over a plain layer."""
    found: list[type[BaseLayer]] = []
    for answer in registry.call_all("tunerkit_base_layers"):
        offered = answer.value
        if not isinstance(offered, tuple | list) or not all(map(_is_kind, offered)):
            raise PluginError(
                f"{answer.plugin} offered {offered!r} as base-layer kinds; tunerkit_base_layers must return a list of "
                "classes that derive from tunerkit.BaseLayer and define all it asks for"
            )
        found += offered
    return (*KINDS, *found)


def _is_kind(kind: object) -> bool:
    if not isinstance(kind, type) or not issubclass(kind, BaseLayer) or inspect.isabstract(kind):
        return False
    return not kind.linear or kind.matrix is not BaseLayer.matrix
