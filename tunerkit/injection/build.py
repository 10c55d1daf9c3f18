"""Build what one adapter puts into a model: its slots. The model is only read."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import TypeVar

import torch
from torch import nn

from tunerkit import hooks
from tunerkit.errors import PluginError, TargetError
from tunerkit.injection.inject import copy_base
from tunerkit.injection.preconditions import refuse_overlap
from tunerkit.injection.slots import Slot
from tunerkit.injection.tuner import Tuner, base_of, modules_in
from tunerkit.layers import Adapter, BaseLayer, bias_name, torch_private, weight_of, weights
from tunerkit.records import Target
from tunerkit.targets import Scan, ScannedModule

M = TypeVar("M", bound=nn.Module)


def build_each(
    scanned: Scan,
    tuner: Tuner,
    *,
    around: Callable[[Target], AbstractContextManager[object]] = nullcontext,
    ready: Mapping[str, Adapter] | None = None,
) -> Iterator[tuple[str, Slot]]:
    """Build what one adapter puts into a model: adapters through the method's plugin, copies and trained biases.

    One slot is built after the other, so that a caller may stop before all of them are in memory.

    Args:
        scanned: The scan of the model.
        tuner: The adapter's handle.
        around: What to enter while the plugin builds the adapter of a target.
        ready: Adapters by target path that the method's plugin has built already, from factors.

    Yields:
        Pairs of a module's path and its slot: targets, copies, then other trained biases.
    """
    targets, copies, biases = (
        {each.path: each for each in kind} for kind in (tuner.targets, tuner.copies, tuner.biases)
    )
    refuse_overlap(tuner.model, modules_in(tuner), copies)
    has_shared = tuner.targets and hooks.implements(hooks.specs.tunerkit_shared, tuner.method)
    first = tuner.targets[0] if has_shared else None
    shared = None if first is None else _shared(tuner, scanned, around(first))

    for path in modules_in(tuner):
        target, found = targets.get(path), scanned.by_path[path]
        adapter = None
        if target is not None:
            base = _base_at(tuner, target, found)
            built = ready[path] if ready is not None else _adapter(tuner, target, base, around(target), shared)
            adapter = _fitted(tuner, target, base, built, read=found.reader is not None)
        yield (
            path,
            Slot(
                method=tuner.method,
                adapter=adapter,
                copy=_copy_of(copies[path], scanned) if path in copies else None,
                bias=_bias_of(biases[path], found.base, scanned) if path in biases else None,
                shared=shared if target is first else None,
            ),
        )


def _shared(tuner: Tuner, scanned: Scan, entered: AbstractContextManager[object]) -> nn.Module | None:
    """Build what the adapters share, on the first target's device and in the config's dtype."""
    bases = [_base_at(tuner, target, scanned.by_path[target.path]) for target in tuner.targets]
    with entered:
        shared = hooks.shared(tuner.method, tuner.targets, bases, tuner.config)
    place = tuner.targets[0].module
    return None if shared is None else _placed(shared, place, getattr(torch, tuner.config.adapter_dtype))


def _versions(shared: nn.Module | None) -> dict[str, tuple[int, int | None]]:
    """Which tensors a module has, and how often each was changed in place."""
    own = {} if shared is None else {**dict(shared.named_buffers()), **dict(shared.named_parameters())}
    return {name: (id(tensor), torch_private.version(tensor)) for name, tensor in own.items()}


def _adapter(
    tuner: Tuner, target: Target, base: BaseLayer, entered: AbstractContextManager[object], shared: nn.Module | None
) -> Adapter:
    """Build one adapter through the method's plugin."""
    versions = _versions(shared)
    with entered:
        built = hooks.build_adapter(tuner.method, target, base, tuner.config, shared)
    if _versions(shared) != versions:
        raise PluginError(
            f"{hooks.registry.plugin_of(tuner.method)} changed the shared module in tunerkit_build_adapter for "
            f"{target.path!r}: adapters that were built before would use other values; set them in tunerkit_shared"
        )
    if shared is not None:
        built.share(shared)
    return built


def _fitted(tuner: Tuner, target: Target, base: BaseLayer, built: Adapter, *, read: bool) -> Adapter:
    """Check that an adapter can work at its target, and move it to its device, in the config's dtype.

    With ``read`` the module's owner reads the weight, and a temporary weight override is all that works there.
    """
    if built.reads_weight and not base.has_weight:
        raise TargetError(
            f"{target.path!r} is a {type(target.module).__name__}, of which tunerkit knows no weight, and method "
            f"{tuner.method!r} reads the weight; exclude it from the targets"
        )
    if read:
        _refuse_unreadable(tuner, target, base)
    return _placed(built, target.module, getattr(torch, tuner.config.adapter_dtype))


def _base_at(tuner: Tuner, target: Target, found: ScannedModule) -> BaseLayer:
    base = base_of(tuner, target.module, found.base)
    if base is None:
        raise TargetError(f"{target.path!r} is a {type(found.module).__name__}: no installed base-layer kind adapts it")
    return base


def _placed(built: M, module: nn.Module, dtype: torch.dtype) -> M:
    """Move an adapter to the device where ``module`` runs. The module's weights may be offloaded to another one.

    Its parameters become contiguous: FSDP2 shards no others.
    """
    for parameter in built.parameters():
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
    device = weights.execution_device(module)
    # It was built on the CPU. Checking whether it must be moved is cheaper than moving it.
    own = chain(built.parameters(), built.buffers())
    there = all(device in (None, t.device) and (t.dtype == dtype or not t.is_floating_point()) for t in own)
    return built if there else built.to(device=device, dtype=dtype)


def _copy_of(copied: Target, scanned: Scan) -> nn.Module:
    for part in copied.module.modules():
        if any(p.is_meta for p in part.parameters(recurse=False)) and weights.offloading(part) is None:
            if scanned.unloaded:  # the values come from a file
                return copy_base(copied.module).to_empty(device="cpu")
            raise _on_meta(copied)
    with weights.gathered(copied.module):
        return copy_base(copied.module)


def _bias_of(biased: Target, base: BaseLayer | None, scanned: Scan) -> nn.Parameter:
    bias = biased.module.get_parameter(bias_name(base))
    if (away := weights.offloading(biased.module)) is not None:
        raise TargetError(
            f"the bias of {biased.path!r} cannot be trained: {away.name} offloads it, and each forward needs it "
            "together with its copy; set bias='none', or keep the module on a device"
        )
    if bias.is_meta and scanned.unloaded:
        return nn.Parameter(torch.empty_like(bias, device="cpu"))
    if bias.is_meta:
        raise _on_meta(biased)
    return nn.Parameter(weight_of(biased.module, bias_name(base)).detach().clone())


def _on_meta(target: Target) -> TargetError:
    return TargetError(f"{target.path!r} has weights on the meta device and cannot be copied; load the weights first")


def _refuse_unreadable(tuner: Tuner, target: Target, base: BaseLayer) -> None:
    """Require what a temporary weight override needs: a delta from the method, and a weight that is a plain matrix."""
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
