"""Build an adapter's parts, inject them into a model and eject them: the only file that changes a model's structure."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import chain

import torch
from torch import nn

from tunerkit import hooks
from tunerkit.errors import AdapterError, PluginError, TargetError, first as first_of, warn
from tunerkit.injection.adapter_checks import note_call, shapes_of, watch
from tunerkit.injection.preconditions import refuse_mixed_dtypes, refuse_overlap, refuse_rows, refuse_running
from tunerkit.injection.slots import Slot, Slots, apply_slots, base_modules, is_called, slots_of, walk
from tunerkit.injection.state_dicts import mark_merged, refuse_state
from tunerkit.injection.tuner import WRAPPED, Tuner, Wrapped, modules_in, slots_in, wrapped_of
from tunerkit.injection.weight_override import drop_overrides_, override_in_
from tunerkit.layers import Adapter, BaseLayer, as_output, bias_name, torch_private, weight_of, weights
from tunerkit.paths import CHILD, join
from tunerkit.records import Target
from tunerkit.targets import Scan, lines

# The attribute of a base's batch norm whose running statistics were turned off by adapters.
_STOPPED = "_tunerkit_earlier"


# --- Building: the model is not changed -------------------------------------------------------------------------------


def build_each(
    scanned: Scan,
    tuner: Tuner,
    *,
    around: Callable[[Target], AbstractContextManager[object]] = nullcontext,
    ready: Mapping[str, Adapter] | None = None,
) -> Iterator[tuple[str, Slot]]:
    """Yield (path, slot) of one adapter lazily, so that a caller may stop before all slots are in memory.

    The plugin builds each target's adapter inside the context ``around(target)``; if ``ready`` is given, its adapters
    are used instead. If the method rejects targets, one `TargetError` at the end lists all of them.
    """
    targets, copies, biases = (
        {each.path: each for each in kind} for kind in (tuner.targets, tuner.copies, tuner.biases)
    )
    refuse_overlap(tuner.model, modules_in(tuner), copies)
    # Only a method that adapts outputs has targets without a base layer.
    bases = {path: scanned.by_path[path].base or as_output(target.module) for path, target in targets.items()}
    first, shared = next(iter(tuner.targets), None), None
    refused: dict[str, TargetError] = {}
    if first is not None and hooks.implements(hooks.specs.tunerkit_shared, tuner.method):
        with around(first):
            places, own = tuner.targets, list(bases.values())
            spec = hooks.specs.tunerkit_shared
            shared = hooks.ask(spec, tuner.method, targets=places, bases=own, config=tuner.config)
        if shared is not None:
            _place_(shared, bases[first.path].holder, tuner)
    for path in modules_in(tuner):
        adapter = None
        if path in targets:
            target = targets[path]
            try:
                with around(target):
                    adapter = _adapter(tuner, target, bases[path], shared) if ready is None else ready[path]
            except TargetError as error:  # the method may reject more targets, and one error lists all of them
                refused[path] = error
                continue
            _refuse_unfit(tuner, target, bases[path], adapter, is_read=scanned.by_path[path].reader is not None)
            _place_(adapter, bases[path].holder, tuner)
        slot = Slot(
            method=tuner.method,
            adapter=adapter,
            copy=_copy_of(copies[path], scanned) if path in copies else None,
            bias=_bias_of(biases[path], scanned) if path in biases else None,
            shared=shared if first is not None and path == first.path else None,
        )
        yield path, slot
    if refused:
        kinds = {path: type(targets[path].module).__name__ for path in refused}
        words = {path: f"method {tuner.method!r} cannot adapt this {kinds[path]}: {refused[path]}" for path in refused}
        text = "\n".join(first_of(lines(words)))
        exclude = f"exclude=({next(iter(refused))!r},{' ...' * (len(refused) > 1)}) leaves these targets out"
        raise TargetError(f"{text}; {exclude}") from next(iter(refused.values()))


def _adapter(tuner: Tuner, target: Target, base: BaseLayer, shared: nn.Module | None) -> Adapter:
    """Build one adapter with the method's plugin. Raises `PluginError` if the plugin changes the shared module."""
    before = {} if shared is None else torch_private.versions(shared)
    built = hooks.ask(
        hooks.specs.tunerkit_build_adapter,
        tuner.method,
        target=target,
        base=base,
        config=tuner.config,
        shared=shared,
        loading=tuner.progress.loaded,
    )
    if shared is not None and torch_private.versions(shared) != before:
        raise PluginError(
            f"{hooks.registry.plugin_of(tuner.method)} changed the shared module in tunerkit_build_adapter for "
            f"{target.path!r}: adapters that were built before would use other values; set them in tunerkit_shared"
        )
    if shared is not None:
        built.share(shared)
    return built


def _refuse_unfit(tuner: Tuner, target: Target, base: BaseLayer, built: Adapter, *, is_read: bool) -> None:
    """Raise `TargetError` if the adapter reads an unknown weight, or a weight used directly cannot have a delta."""
    if built.reads_weight and not base.has_weight:
        raise TargetError(
            f"{target.path!r} is a {type(target.module).__name__}, whose weight tunerkit does not know, and method "
            f"{tuner.method!r} reads the weight; exclude it from the targets"
        )
    if not is_read:
        return
    bypassed = f"{target.path!r} is used directly by its owner, bypassing the layer's forward(), "
    if not hooks.has_delta(tuner.method):
        raise TargetError(
            f"{bypassed}so an adapter can only add a delta to the weight, and the plugin of method {tuner.method!r} "
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


def _place_(built: nn.Module, module: nn.Module, tuner: Tuner) -> None:
    """Move a new module to the config's dtype, and to the device where ``module`` runs, even if that is offloaded."""
    for parameter in built.parameters():  # FSDP2 shards only contiguous parameters
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
    device, dtype = weights.execution_device(module), getattr(torch, tuner.config.adapter_dtype)
    # A check is cheaper than `to`, and mostly the part is in place already.
    own = chain(built.parameters(), built.buffers())
    if not all(device in (None, t.device) and (t.dtype == dtype or not t.is_floating_point()) for t in own):
        built.to(device=device, dtype=dtype)


def _copy_of(copied: Target, scanned: Scan) -> nn.Module:
    parts = [part for part in copied.module.modules() if weights.offloading(part) is None]
    if _comes_from_file(copied, [p for part in parts for p in part.parameters(recurse=False)], scanned):
        return copy_base(copied.module).to_empty(device="cpu")
    with weights.gathered(copied.module):
        return copy_base(copied.module)


def _bias_of(biased: Target, scanned: Scan) -> nn.Parameter:
    name = bias_name(scanned.by_path[biased.path].base)
    bias = biased.module.get_parameter(name)
    if (away := weights.offloading(biased.module)) is not None:
        raise TargetError(
            f"the bias of {biased.path!r} cannot be trained: {away.name} offloads it, and each forward needs both the "
            "bias and its trained copy; set bias='none', or keep the module on a device"
        )
    if _comes_from_file(biased, [bias], scanned):
        return nn.Parameter(torch.empty_like(bias, device="cpu"))
    return nn.Parameter(weight_of(biased.module, name).detach().clone())


def _comes_from_file(place: Target, parameters: Iterable[nn.Parameter], scanned: Scan) -> bool:
    """Whether parameters are on the meta device until a file fills them. Raises `TargetError` if no file will."""
    if not any(parameter.is_meta for parameter in parameters):
        return False
    if not scanned.unloaded:
        raise TargetError(f"{place.path!r} has weights on the meta device and cannot be copied; load the weights first")
    return True


# --- Changing the model -----------------------------------------------------------------------------------------------


def completed(function: Callable[..., object], *args: object) -> None:
    """Call an idempotent function. After an interrupt, call it again to completion, then raise the interrupt."""
    with ExitStack() as rest:
        rest.callback(function, *args)
        function(*args)
        rest.pop_all()


def inject_(tuner: Tuner, built: Mapping[str, Slot], scanned: Scan, undo: ExitStack, *, trainable: bool) -> None:
    """Freeze the base, and add the slots in ``built`` (by path) to their modules, each with one forward hook.

    The rollback is added to ``undo`` before the first change.
    """
    model = tuner.model
    refuse_running(model, "adding an adapter")
    tuner.progress.shapes = shapes_of(model)
    if trainable:
        refuse_mixed_dtypes(tuner, built)
    undo.callback(eject_, [tuner])
    if not wrapped_of(model).tuners:
        _prepare_(model)
    readers = [_put_(path, module, tuner, built[path], scanned) for path, module in modules_in(tuner).items()]
    encoders = (each.module for each in scanned.by_path.values() if isinstance(each.module, nn.TransformerEncoder))
    if owners := [reader for reader in (*readers, *encoders) if reader is not None]:
        override_in_(owners)
    for copied in tuner.copies:
        # The original still runs beside its copy: its batch norms must not update their running statistics.
        for _, norm in base_modules(copied.module):
            if torch_private.is_batch_norm(norm) and norm.track_running_stats:
                vars(norm)[_STOPPED] = True
                norm.track_running_stats = False
    wrapped = wrapped_of(model)
    wrapped.tuners[tuner.name] = tuner
    wrapped.active = (*wrapped.active, tuner.name)
    train_(tuner, trained=trainable)
    _prepare_next_forward_(model)
    _warn_of_products(model)


def _prepare_(model: nn.Module) -> None:
    """Freeze the base and register the model's hooks; only once per model, since users may unfreeze the base later."""
    own = {  # tied parameters under all of their names, since merging may untie them
        join(path, name): parameter
        for path, module in base_modules(model)
        for name, parameter in torch_private.own_parameters(module).items()
        if parameter is not None and parameter.requires_grad
    }
    vars(model)[WRAPPED] = Wrapped(frozen=tuple(own))  # first, so that an interrupted call can be undone
    for parameter in own.values():
        parameter.requires_grad_(False)
    _watch_states_(model)
    model.register_forward_pre_hook(refuse_rows, prepend=True, with_kwargs=True)
    hooks.wrapped(model)


def _put_(path: str, module: nn.Module, tuner: Tuner, slot: Slot, scanned: Scan) -> nn.Module | None:
    """Put an adapter's slot into one module; return the owner that uses the module's weight directly, or None."""
    slots, found = slots_of(module), scanned.by_path[path]
    # A copy replaces the whole module, so there is no base layer.
    base, reader = (found.base, found.reader) if slot.copy is None else (None, None)
    if slot.adapter is not None and base is None:
        base = as_output(module)
    if slots is None:
        slots = Slots(base).train(module.training)
        module.add_module(CHILD, slots)
        _watch_states_(module)
        if reader is None:
            # Prepended, so that the base's own hooks see the same output as after a merge.
            module.register_forward_hook(apply_slots, with_kwargs=True, prepend=True)
    elif slots.base is None and base is not None:  # another adapter trains the bias of a module without a kind
        slots.see_as(base)
    if not module.training:  # new parts are in training mode
        slot.eval()
    slots.put(tuner.name, slot)
    return reader


def _watch_states_(module: nn.Module) -> None:
    module.register_state_dict_post_hook(mark_merged)
    module.register_load_state_dict_pre_hook(refuse_state)


def eject_(tuners: Sequence[Tuner]) -> None:
    """Remove adapters from their common model; modules without other adapters lose their slots and hooks.

    This also completes an interrupted call, and undoes a partial `inject_`.
    """
    model = tuners[0].model
    wrapped = wrapped_of(model)
    frozen = set(wrapped.frozen)
    for tuner in tuners:
        for module in modules_in(tuner).values():
            if (slots := slots_of(module)) is not None:
                slots.drop(tuner.name)
                if slots.names:
                    continue
                delattr(module, CHILD)
            if module is not model:
                torch_private.remove_state_hooks_(module, mark_merged, refuse_state)
            torch_private.remove_hooks_(module, apply_slots)
            _resume_statistics_(module)
        wrapped.tuners.pop(tuner.name, None)
        wrapped.active = tuple(name for name in wrapped.active if name != tuner.name)
    drop_overrides_(model)
    if not wrapped.tuners:
        for name, parameter in model.named_parameters():
            if name in frozen:
                # A base that was built in inference mode accepts requires_grad only there.
                with torch.inference_mode(parameter.is_inference()):
                    parameter.requires_grad_(True)
        torch_private.remove_state_hooks_(model, mark_merged, refuse_state)
        torch_private.remove_hooks_(model, refuse_rows)
        hooks.tell(hooks.specs.tunerkit_unwrapped, model=model)
        vars(model).pop(WRAPPED, None)
    _prepare_next_forward_(model)


def activate_(model: nn.Module, names: Sequence[str]) -> None:
    """Apply exactly the named adapters, in this order. Compiled code stays valid: its guards check `Slots.active`."""
    refuse_running(model, "activating adapters")
    adapted = walk(model)
    for path, _, slots in adapted:
        rivals = [name for name in names if name in slots.copies]
        if len(rivals) > 1:
            raise AdapterError(
                f"adapters {rivals[0]!r} and {rivals[1]!r} both train {path!r} in full, and one replaces the other; "
                "activate one of them at a time"
            )
    wrapped_of(model).active = tuple(names)
    for _, _, slots in adapted:
        slots.activate(names)
    _warn_of_products(model)


def _warn_of_products(model: nn.Module) -> None:
    """Warn if two active adapters multiply one layer: their changes are added, not multiplied."""
    for path, _, slots in walk(model):
        if len(slots.active) < 2:
            continue
        pairs = zip(slots.active, slots.applied, strict=True)
        own = [name for name, slot in pairs if slot.adapter is not None and hooks.registry.get(slot.method).multiplies]
        if len(own) > 1:
            warn(
                f"adapters {own[0]!r} and {own[1]!r} both multiply {path!r}: their changes to the base are added, not "
                "multiplied. Activate one at a time; or, to apply one after the other, merge the first with "
                "tunerkit.unwrap(model, keep_merged=True), then wrap the second"
            )
            return


def rename_(tuner: Tuner, new: str) -> None:
    """Rename an adapter. The Parameter objects stay the same, so the optimizer still trains them."""
    old, wrapped = tuner.name, wrapped_of(tuner.model)
    for module in modules_in(tuner).values():
        if (slots := slots_of(module)) is not None:
            slots.rename(old, new)
    object.__setattr__(tuner, "name", new)  # a tuner's fields are read-only for everybody else
    wrapped.tuners = {other.name: other for other in wrapped.tuners.values()}
    wrapped.active = tuple(new if name == old else name for name in wrapped.active)


def train_(tuner: Tuner, *, trained: bool) -> None:
    """Make an adapter trainable, or freeze it and drop its gradients, which an optimizer step would still apply."""
    for _, slot in slots_in(tuner):
        for name, parameter in slot.named_parameters():
            can_have_gradient = parameter.is_floating_point() or parameter.is_complex()
            parameter.requires_grad_(trained and can_have_gradient and name not in slot.fixed)
            if not trained:
                parameter.grad = None


def _prepare_next_forward_(model: nn.Module) -> None:
    """Watch the next forward of the adapted modules, tell plugins that the model changed, and discard compiled code."""
    adapted = {
        path: module for tuner in wrapped_of(model).tuners.values() for path, module in modules_in(tuner).items()
    }
    # A module without the hook is not called: its owner uses the overridden weight directly.
    watch(model, {path: module for path, module in adapted.items() if is_called(module)})
    hooks.adapted(model, [*adapted.values()])
    torch_private.forget_compiled()


def copy_base(module: nn.Module) -> nn.Module:
    """Return a copy of a module of the base, without the slots and hooks of adapters."""
    slots = slots_of(module)
    # The slots are replaced before copying, since the other adapters' copies may be large.
    twin = weights.duplicate(module, {id(slots): nn.Module()} if slots is not None else {})
    if slots is not None:
        delattr(twin, CHILD)
    torch_private.remove_hooks_(twin, apply_slots, note_call)
    torch_private.mute_hooks_(twin)
    hooks.tell(hooks.specs.tunerkit_unwrapped, model=twin)
    for part in twin.modules():
        torch_private.remove_state_hooks_(part, mark_merged, refuse_state)
    torch_private.remove_hooks_(twin, refuse_rows)
    _resume_statistics_(twin)
    return twin


def _resume_statistics_(module: nn.Module) -> None:
    """Make the batch norms in a module update their running statistics again, after `inject_` stopped them."""
    for part in module.modules():
        if torch_private.is_batch_norm(part) and _STOPPED in vars(part):
            part.track_running_stats = True
            del vars(part)[_STOPPED]  # last, so that an interrupted call can be repeated
