"""Build what one adapter puts into a model: its slots. The model is only read."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import chain

import torch
from torch import nn

from tunerkit import hooks
from tunerkit.errors import PluginError, TargetError
from tunerkit.injection.inject import copy_base
from tunerkit.injection.preconditions import refuse_overlap
from tunerkit.injection.slots import Slot
from tunerkit.injection.tuner import Tuner, modules_in
from tunerkit.layers import Adapter, BaseLayer, OutputLayer, bias_name, torch_private, weight_of, weights
from tunerkit.records import Target
from tunerkit.targets import Scan


def build_each(
    scanned: Scan,
    tuner: Tuner,
    *,
    around: Callable[[Target], AbstractContextManager[object]] = nullcontext,
    ready: Mapping[str, Adapter] | None = None,
) -> Iterator[tuple[str, Slot]]:
    """Yield the slots of one adapter by path, in the order of `modules_in`.

    One is built after the other, so that a caller may stop before all of them are in memory.

    Args:
        scanned: The scan of the model.
        tuner: The adapter's handle.
        around: What to enter while the plugin builds the adapter of a target.
        ready: Adapters by target path that the method's plugin has built already, from factors.
    """
    targets, copies, biases = (
        {each.path: each for each in kind} for kind in (tuner.targets, tuner.copies, tuner.biases)
    )
    refuse_overlap(tuner.model, modules_in(tuner), copies)
    bases = {path: _base_at(tuner, target, scanned) for path, target in targets.items()}
    first = tuner.targets[0] if tuner.targets and hooks.has_shared(tuner.method) else None
    shared = None
    if first is not None:
        with around(first):
            shared = hooks.shared(tuner.method, tuner.targets, list(bases.values()), tuner.config)
        _place_(shared, first.module, tuner)

    for path in modules_in(tuner):
        target, adapter = targets.get(path), None
        if target is not None:
            if ready is not None:
                adapter = ready[path]
            else:
                with around(target):
                    adapter = _adapter(tuner, target, bases[path], shared)
            _refuse_unfit(tuner, target, bases[path], adapter, is_read=scanned.by_path[path].reader is not None)
            _place_(adapter, target.module, tuner)
        yield (
            path,
            Slot(
                method=tuner.method,
                adapter=adapter,
                copy=_copy_of(copies[path], scanned) if path in copies else None,
                bias=_bias_of(biases[path], scanned) if path in biases else None,
                shared=shared if target is first else None,
            ),
        )


def _base_at(tuner: Tuner, target: Target, scanned: Scan) -> BaseLayer:
    """Return a target as its method sees it: a method that adapts outputs needs no kind that matches the module."""
    base = scanned.by_path[target.path].base
    if base is None and hooks.registry.get(tuner.method).targets == "outputs":
        return OutputLayer(target.module)
    if base is None:
        kind = type(target.module).__name__
        raise TargetError(f"{target.path!r} is a {kind}: no installed base-layer kind adapts it")
    return base


def _adapter(tuner: Tuner, target: Target, base: BaseLayer, shared: nn.Module | None) -> Adapter:
    """Build one adapter through the method's plugin, which must not change what all of them share."""
    before = _versions(shared)
    built = hooks.build_adapter(tuner.method, target, base, tuner.config, shared)
    if _versions(shared) != before:
        raise PluginError(
            f"{hooks.registry.plugin_of(tuner.method)} changed the shared module in tunerkit_build_adapter for "
            f"{target.path!r}: adapters that were built before would use other values; set them in tunerkit_shared"
        )
    if shared is not None:
        built.share(shared)
    return built


def _versions(shared: nn.Module | None) -> dict[str, tuple[int, int | None]]:
    """Which tensors a module has, and how often each was changed in place."""
    own = {} if shared is None else {**dict(shared.named_buffers()), **dict(shared.named_parameters())}
    return {name: (id(tensor), torch_private.version(tensor)) for name, tensor in own.items()}


def _refuse_unfit(tuner: Tuner, target: Target, base: BaseLayer, built: Adapter, *, is_read: bool) -> None:
    """Refuse an adapter that cannot work at its target.

    Where the module's owner reads the weight, only a temporary weight override works. It needs a delta from the method,
    and a weight that is a plain matrix.
    """
    if built.reads_weight and not base.has_weight:
        raise TargetError(
            f"{target.path!r} is a {type(target.module).__name__}, of which tunerkit knows no weight, and method "
            f"{tuner.method!r} reads the weight; exclude it from the targets"
        )
    if not is_read:
        return
    bypassed = f"{target.path!r} is used directly by its owner, bypassing the layer's forward(), "
    if not hooks.has_delta(tuner.method):
        raise TargetError(
            f"{bypassed}so the adapter's delta is added to its weight, and the plugin of method {tuner.method!r} "
            "implements neither tunerkit_delta nor tunerkit_factors; exclude it from the targets"
        )
    weight = torch_private.own_parameters(target.module).get(base.weight_name)
    if weight is not None and (holder := weights.emptied([weight])) is not None:
        raise TargetError(
            f"{bypassed}so its delta must be added to the weight, which {holder.name} has partitioned; exclude it from "
            f"the targets, or {holder.way_out}"
        )
    if weight is None or not weight.is_floating_point() or base.packing is not None:
        raise TargetError(
            f"{bypassed}and its weight is not a plain matrix to which a delta can be added; exclude it from the targets"
        )


def _place_(built: nn.Module | None, module: nn.Module, tuner: Tuner) -> None:
    """Move a new part to the device where ``module`` runs, and to the config's dtype.

    The module's weights may be offloaded to another device. Parameters become contiguous: FSDP2 shards no others.
    """
    if built is None:
        return
    for parameter in built.parameters():
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
    device, dtype = weights.execution_device(module), getattr(torch, tuner.config.adapter_dtype)
    # It was built on the CPU. Checking whether it must be moved is cheaper than moving it.
    own = chain(built.parameters(), built.buffers())
    if not all(device in (None, t.device) and (t.dtype == dtype or not t.is_floating_point()) for t in own):
        built.to(device=device, dtype=dtype)


def _copy_of(copied: Target, scanned: Scan) -> nn.Module:
    for part in copied.module.modules():
        if any(p.is_meta for p in part.parameters(recurse=False)) and weights.offloading(part) is None:
            if scanned.unloaded:  # the values come from a file
                return copy_base(copied.module).to_empty(device="cpu")
            raise _on_meta(copied)
    with weights.gathered(copied.module):
        return copy_base(copied.module)


def _bias_of(biased: Target, scanned: Scan) -> nn.Parameter:
    name = bias_name(scanned.by_path[biased.path].base)
    bias = biased.module.get_parameter(name)
    if (away := weights.offloading(biased.module)) is not None:
        raise TargetError(
            f"the bias of {biased.path!r} cannot be trained: {away.name} offloads it, and each forward needs it "
            "together with its copy; set bias='none', or keep the module on a device"
        )
    if bias.is_meta and scanned.unloaded:
        return nn.Parameter(torch.empty_like(bias, device="cpu"))
    if bias.is_meta:
        raise _on_meta(biased)
    return nn.Parameter(weight_of(biased.module, name).detach().clone())


def _on_meta(target: Target) -> TargetError:
    return TargetError(f"{target.path!r} has weights on the meta device and cannot be copied; load the weights first")
