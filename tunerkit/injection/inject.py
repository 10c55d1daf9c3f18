"""Put adapters into a model and take them out again: the only file that changes a model's structure."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from tunerkit import hooks
from tunerkit.errors import AdapterError
from tunerkit.injection.integrity import note_call, watch
from tunerkit.injection.preconditions import refuse_mixed_dtypes, refuse_running, unwatch_threads_, watch_threads_
from tunerkit.injection.slots import Slot, Slots, apply_slots, base_modules, is_called, slots_of, walk
from tunerkit.injection.state_dicts import unwatch_states_, watch_states_
from tunerkit.injection.tuner import WRAPPED, Tuner, modules_in, slots_in, wrapped_of
from tunerkit.injection.weight_override import update_overrides_
from tunerkit.layers import OutputLayer, torch_private, weights
from tunerkit.paths import CHILD, is_adapter_path
from tunerkit.targets import Scan

# The attribute of a batch norm of the base that adapters have stopped from updating its statistics.
_STOPPED = "_tunerkit_earlier"


def inject_(tuner: Tuner, built: Mapping[str, Slot], scanned: Scan, *, trainable: bool) -> None:
    """Freeze the base and add the adapter's slots, ``built`` by path, to its modules, each with one forward hook.

    If this raises, also a KeyboardInterrupt, nothing is added.
    """
    refuse_running(tuner.model, "adding an adapter")
    if trainable:
        refuse_mixed_dtypes(tuner, built)
    try:
        _inject_(tuner, built, scanned)
        train_(tuner, trained=trainable)
        _prepare_next_forward_(tuner.model)
    except BaseException:
        _eject_([tuner])
        raise


def _inject_(tuner: Tuner, built: Mapping[str, Slot], scanned: Scan) -> None:
    model, wrapped, readers = tuner.model, wrapped_of(tuner.model), []
    if not wrapped.tuners:
        # A base parameter that is unfrozen later is meant to be trained, so only the first adapter freezes.
        own = {name: p for name, p in model.named_parameters() if p.requires_grad and not is_adapter_path(name)}
        wrapped.frozen = tuple(own)
        vars(model)[WRAPPED] = wrapped  # first, so that an interruption can be undone
        for parameter in own.values():
            parameter.requires_grad_(False)
        watch_states_(model)
        watch_threads_(model)
        hooks.wrapped(model)
    for path, module in modules_in(tuner).items():
        slot, slots, found = built[path], slots_of(module), scanned.by_path[path]
        # A copy replaces the whole module, so there is no base layer.
        base, reader = (found.base, found.reader) if slot.copy is None else (None, None)
        if slot.adapter is not None and base is None:
            base = OutputLayer(module)
        readers.append(reader)
        if slots is None:
            slots = Slots(base).train(module.training)
            module.add_module(CHILD, slots)
            watch_states_(module)
            if reader is None:
                # First: the base's own hooks then see the same output as after a merge.
                module.register_forward_hook(apply_slots, with_kwargs=True, prepend=True)
        elif slots.base is None and base is not None:  # another adapter trains the bias of a module without a kind
            slots.see_as(base)
        if not module.training:  # new parts are in training mode, and a copy has the modes of its original
            slot.eval()
        slots.put(tuner.name, slot)
    update_overrides_(model, readers)
    for copied in tuner.copies:
        # The module still runs itself. A batch norm then uses its statistics but does not update them.
        for _, norm in base_modules(copied.module):
            if torch_private.is_batch_norm(norm) and norm.track_running_stats:
                vars(norm)[_STOPPED] = True
                norm.track_running_stats = False
    wrapped.tuners[tuner.name] = tuner
    wrapped.active = (*wrapped.active, tuner.name)


def eject_(tuners: Sequence[Tuner]) -> None:
    """Take adapters out of their one model. Modules without any adapter left lose the child and the hook.

    If this is interrupted (KeyboardInterrupt), they are taken out all the same before it raises.
    """
    try:
        _eject_(tuners)
    except BaseException:
        _eject_(tuners)
        raise


def _eject_(tuners: Sequence[Tuner]) -> None:
    """Take adapters out. It also completes an earlier call that was interrupted, and undoes a half `_inject_`."""
    model = tuners[0].model
    wrapped = wrapped_of(model)
    frozen = set(wrapped.frozen)
    for tuner in tuners:
        for module in modules_in(tuner).values():
            _clear_(module, tuner)
        wrapped.tuners.pop(tuner.name, None)
        wrapped.active = tuple(name for name in wrapped.active if name != tuner.name)
    update_overrides_(model)
    if not wrapped.tuners:
        for name, parameter in model.named_parameters():
            if name in frozen:
                # A base that was built in inference mode accepts requires_grad only there.
                with torch.inference_mode(parameter.is_inference()):
                    parameter.requires_grad_(True)
        unwatch_states_(model)
        unwatch_threads_(model)
        hooks.unwrapped(model)
        vars(model).pop(WRAPPED, None)
    _prepare_next_forward_(model)


def _clear_(module: nn.Module, tuner: Tuner) -> None:
    """Remove an adapter's slot from a module, and our hooks if it was the last one."""
    if (slots := slots_of(module)) is not None:
        slots.drop(tuner.name)
        if slots.names:
            return
        delattr(module, CHILD)
    if module is not tuner.model:
        unwatch_states_(module)
    torch_private.remove_hooks_(module, apply_slots)
    _resume_statistics_(module)


def activate_(model: nn.Module, names: Sequence[str]) -> None:
    """Apply exactly the named adapters, in this order. Compiled code follows: its guards read the tuples."""
    refuse_running(model, "activating adapters")
    adapted = list(walk(model))
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


def rename_(tuner: Tuner, new: str) -> None:
    """Give an adapter another name. Its parameters stay the same objects, which its optimizer holds."""
    old, wrapped = tuner.name, wrapped_of(tuner.model)
    for module in modules_in(tuner).values():
        if (slots := slots_of(module)) is not None:
            slots.rename(old, new)
    object.__setattr__(tuner, "name", new)  # a tuner's fields are read-only for everybody else
    wrapped.tuners = {other.name: other for other in wrapped.tuners.values()}
    wrapped.active = tuple(new if name == old else name for name in wrapped.active)


def train_(tuner: Tuner, *, trained: bool) -> None:
    """Make an adapter trainable, or freeze it and free its gradients, which an optimizer step would still apply.

    Parameters that the method built without gradients are never trained.
    """
    for _, slot in slots_in(tuner):
        for name, parameter in slot.named_parameters():
            continuous = parameter.is_floating_point() or parameter.is_complex()
            parameter.requires_grad_(trained and continuous and name not in slot.fixed)
            if not trained:
                parameter.grad = None


def _prepare_next_forward_(model: nn.Module) -> None:
    """Restart the checks of the next forward, for the modules that are adapted now, and drop compiled code."""
    adapted = {
        path: module for tuner in wrapped_of(model).tuners.values() for path, module in modules_in(tuner).items()
    }
    # A module without the hook is not called: its owner uses the overridden weight directly.
    watch(model, {path: module for path, module in adapted.items() if is_called(module)})
    hooks.adapted(model, [*adapted.values()])
    torch_private.forget_compiled()


def copy_base(module: nn.Module) -> nn.Module:
    """Return a copy of the base's own module, without what other adapters have put there."""
    slots = slots_of(module)
    # The slots are replaced before copying, since the other adapters' copies may be large.
    twin = weights.duplicate(module, {id(slots): nn.Module()} if slots is not None else {})
    if slots is not None:
        delattr(twin, CHILD)
    torch_private.remove_hooks_(twin, apply_slots, note_call)
    torch_private.mute_hooks_(twin)
    hooks.unwrapped(twin)
    for part in twin.modules():
        unwatch_states_(part)
    unwatch_threads_(twin)
    _resume_statistics_(twin)
    return twin


def _resume_statistics_(module: nn.Module) -> None:
    """Let the batch norms in a module update their statistics again."""
    for part in module.modules():
        if torch_private.is_batch_norm(part) and _STOPPED in vars(part):
            part.track_running_stats = True
            del vars(part)[_STOPPED]  # last, so that an interrupted call can be repeated
