"""Put adapters into a model and take them out again: the only place that changes a model's structure."""

from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import nn

from tunerkit.injection.slots import Slot, Slots, apply_slots, base_modules, slots_of, walk
from tunerkit.injection.tuner import Tuner, set_wrapped, wrapped_of
from tunerkit.injection.uncalled import note_call, unwatch, watch
from tunerkit.injection.unsynchronised import check_at_next_forward_, forget_check_, refuse_unsynchronised
from tunerkit.injection.weight_override import forget_idle_, override_in_
from tunerkit.libraries import duplicate, torch_private
from tunerkit.paths import CHILD, is_adapter_path
from tunerkit.targets import ScannedModule

# Marks a batch norm whose statistics are held, to be moved again after unwrapping.
_HELD = "_tunerkit_held"


@attrs.frozen(eq=False)
class Plan:
    """Everything that one adapter puts into a model, built and checked, the model still untouched.

    ``places`` says of each path what the scan found there; what is trained as a copy is no base layer.
    """

    tuner: Tuner
    slots: Mapping[str, Slot]
    places: Mapping[str, ScannedModule]


def inject_(plan: Plan, *, trainable: bool) -> None:
    """Freeze the base and add the plan's slots beside its modules, each with one forward hook."""
    tuner = plan.tuner
    model = tuner.model
    wrapped = wrapped_of(model)
    for slot in plan.slots.values():
        _train(slot, trainable)
    if not wrapped.tuners:
        # Once: what somebody thawed beside the first adapter is meant to be trained.
        wrapped.frozen = freeze_base_(model)
    for path, module in tuner.modules().items():
        slots = slots_of(module)
        if slots is None:
            slots = Slots(plan.places[path].base)
            _follow(slots, module)
            module.add_module(CHILD, slots)
            if plan.places[path].reader is None:
                module.register_forward_hook(apply_slots, with_kwargs=True)
        slot = plan.slots[path]
        _follow(slot, module)
        slots.put(tuner.name, slot)
    override_in_(model, (place.reader for place in plan.places.values()))
    for place in tuner.copies:
        hold_statistics_(place.module)
    wrapped.tuners[tuner.name] = tuner
    wrapped.active = (*wrapped.active, tuner.name)
    set_wrapped(model, wrapped)
    _watch(model)
    torch_private.forget_compiled()


def eject_(tuner: Tuner) -> None:
    """Take one adapter out; a module without any left loses the child and the hook."""
    for module in tuner.modules().values():
        slots = slots_of(module)
        if slots is None or slots.get(tuner.name) is None:
            continue
        slots.drop(tuner.name)
        if not slots.names:
            delattr(module, CHILD)
            torch_private.remove_hooks_(module, apply_slots)
    for place in tuner.copies:
        if slots_of(place.module) is None:  # else another adapter trains it as a copy too
            release_statistics_(place.module)
    wrapped = wrapped_of(tuner.model)
    del wrapped.tuners[tuner.name]
    wrapped.active = tuple(name for name in wrapped.active if name != tuner.name)
    wrapped.fingerprints.pop(tuner.name, None)
    if not wrapped.tuners:
        thaw_base_(tuner.model, wrapped.frozen)
    forget_idle_(tuner.model)
    set_wrapped(tuner.model, wrapped)
    _watch(tuner.model)
    torch_private.forget_compiled()


def activate_(model: nn.Module, names: Sequence[str]) -> None:
    """Apply exactly the adapters named, in that order. Compiled code follows: its guards read the tuples."""
    wrapped_of(model).active = tuple(names)
    for _, _, slots in walk(model):
        slots.active = tuple(name for name in names if slots.get(name) is not None)


def rename_(tuner: Tuner, new: str) -> None:
    """Give an adapter another name; its parameters stay the objects that its optimizer holds."""
    old = tuner.name
    for module in tuner.modules().values():
        slots = slots_of(module)
        if slots is not None and slots.get(old) is not None:
            slots.rename(old, new)
    wrapped = wrapped_of(tuner.model)
    tuner.rename_(new)
    wrapped.tuners = {other.name: other for other in wrapped.tuners.values()}
    wrapped.active = tuple(new if name == old else name for name in wrapped.active)
    wrapped.fingerprints = {new if name == old else name: kept for name, kept in wrapped.fingerprints.items()}


def train_(tuner: Tuner, *, trained: bool) -> None:
    """Let an adapter be trained or not; one that is not keeps no gradient, which a step would still apply."""
    for _, slot in tuner.slots():
        _train(slot, trained)


def _train(slot: Slot, trained: bool) -> None:
    for parameter in slot.parameters():
        parameter.requires_grad_(trained and (parameter.is_floating_point() or parameter.is_complex()))
        if not trained:
            parameter.grad = None


def _follow(part: nn.Module, module: nn.Module) -> None:
    """Put ``part`` into the mode of ``module``. A new part trains; a copy has the modes of what it was copied from."""
    if not module.training:
        part.eval()


def _watch(model: nn.Module) -> None:
    """Watch the next forward anew, for the places that are adapted now."""
    unwatch(model)
    forget_check_(model)
    places = {path: module for tuner in wrapped_of(model).tuners.values() for path, module in tuner.modules().items()}
    # Where an owner reads overridden weights the module itself is never called, and rightly.
    hooked = {path: module for path, module in places.items() if torch_private.has_hook(module, apply_slots)}
    if hooked:
        watch(model, hooked)
    check_at_next_forward_([model, *places.values()] if places else [])


def copy_base(module: nn.Module) -> nn.Module:
    """A copy of the base's own module, without what other adapters have put there."""
    slots = slots_of(module)
    # What the memo knows is not copied: the other adapters' copies may be large.
    twin = duplicate(module, {id(slots): nn.Module()} if slots is not None else {})
    if slots is not None:
        delattr(twin, CHILD)
    torch_private.remove_hooks_(twin, apply_slots, refuse_unsynchronised, note_call)
    release_statistics_(twin)
    return twin


def hold_statistics_(module: nn.Module) -> None:
    """Stop the batch norms of a module that is trained as a copy: it still runs, and its statistics are the base's.

    Without ``track_running_stats`` a batch norm reads its statistics as before and does not move them.
    """
    for _, norm in base_modules(module):
        if torch_private.is_batch_norm(norm) and norm.track_running_stats:
            norm.track_running_stats = False
            vars(norm)[_HELD] = True


def release_statistics_(module: nn.Module) -> None:
    """Undo `hold_statistics_`."""
    for norm in module.modules():
        if vars(norm).pop(_HELD, False):
            vars(norm)["track_running_stats"] = True


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's own parameters by name, every adapter left out."""
    return {name: p for name, p in model.named_parameters() if not is_adapter_path(name)}


def freeze_base_(model: nn.Module) -> tuple[str, ...]:
    """Freeze what the model trains of its own; the names, so that unwrapping can undo it."""
    trained = {name: p for name, p in base_parameters(model).items() if p.requires_grad}
    for parameter in trained.values():
        parameter.requires_grad_(False)
    return tuple(trained)


def thaw_base_(model: nn.Module, names: tuple[str, ...]) -> None:
    """Undo `freeze_base_`."""
    parameters = base_parameters(model)
    for name in names:
        if name in parameters:
            # A base that was built in inference mode asks for a gradient only there.
            with torch.inference_mode(parameters[name].is_inference()):
                parameters[name].requires_grad_(True)
