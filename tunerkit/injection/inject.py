"""Put adapters into a model and take them out again: the only place that changes a model's structure."""

import importlib
import sys
from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tunerkit.injection.slots import Slot, Slots, apply_slots, base_modules, slots_of, walk
from tunerkit.injection.tuner import Tuner, own_tuners, set_tuners
from tunerkit.injection.uncalled import forget_, unwatch, watch
from tunerkit.injection.weight_override import forget_idle_, lend_in_
from tunerkit.libraries import duplicate
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
    others = own_tuners(model)
    for slot in plan.slots.values():
        _train(slot, trainable)
    # Once: what somebody thawed beside the first adapter is meant to be trained.
    tuner.frozen = () if others else freeze_base_(model)
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
    lend_in_(model, (place.reader for place in plan.places.values()))
    for place in tuner.copies:
        hold_statistics_(place.module)
    tuner.turn = 1 + max((other.turn for other in others.values() if other.turn is not None), default=-1)
    set_tuners(model, {**others, tuner.name: tuner})
    _watch(model)
    forget_compiled()


def eject_(tuner: Tuner) -> None:
    """Take one adapter out; a module without any left loses the child and the hook."""
    for module in tuner.modules().values():
        slots = slots_of(module)
        if slots is None or slots.get(tuner.name) is None:
            continue
        slots.drop(tuner.name)
        if not slots.names:
            del module._modules[CHILD]
            remove_hook_(module)
    for place in tuner.copies:
        if slots_of(place.module) is None:  # else another adapter trains it as a copy too
            release_statistics_(place.module)
    tuner.turn = None
    left = {name: other for name, other in own_tuners(tuner.model).items() if other is not tuner}
    if left:
        heir = next(iter(left.values()))
        heir.frozen = tuple(dict.fromkeys((*heir.frozen, *tuner.frozen)))
    else:
        thaw_base_(tuner.model, tuner.frozen)
    forget_idle_(tuner.model)
    set_tuners(tuner.model, left)
    _watch(tuner.model)
    forget_compiled()


def activate_(model: nn.Module, names: Sequence[str]) -> None:
    """Apply exactly the adapters named, in that order. Compiled code follows: its guards read the tuples."""
    for name, tuner in own_tuners(model).items():
        tuner.turn = names.index(name) if name in names else None
    for _, _, slots in walk(model):
        slots.active = tuple(name for name in names if slots.get(name) is not None)


def rename_(tuner: Tuner, new: str) -> None:
    """Give an adapter another name; its parameters stay the objects that its optimizer holds."""
    old = tuner.name
    for module in tuner.modules().values():
        slots = slots_of(module)
        if slots is not None and slots.get(old) is not None:
            slots.rename(old, new)
    tuner.name = new
    tuners = own_tuners(tuner.model)
    set_tuners(tuner.model, {new if name == old else name: other for name, other in tuners.items()})


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
    places = {path: module for tuner in own_tuners(model).values() for path, module in tuner.modules().items()}
    # Where weights are lent to an owner the module itself is never called, and rightly.
    hooked = {path: module for path, module in places.items() if apply_slots in module._forward_hooks.values()}
    if hooked:
        watch(model, hooked)


def copy_base(module: nn.Module) -> nn.Module:
    """A copy of the base's own module, without what other adapters have put there."""
    slots = slots_of(module)
    # What the memo knows is not copied: the other adapters' copies may be large.
    twin = duplicate(module, {id(slots): nn.Module()} if slots is not None else {})
    if slots is not None:
        del twin._modules[CHILD]
    remove_hook_(twin)
    forget_(twin)
    release_statistics_(twin)
    return twin


def remove_hook_(module: nn.Module) -> None:
    """Remove our forward hook; found by the function itself, since a handle would not survive a deep copy."""
    for key in [key for key, hook in module._forward_hooks.items() if hook is apply_slots]:
        del module._forward_hooks[key]
        module._forward_hooks_with_kwargs.pop(key, None)


def hold_statistics_(module: nn.Module) -> None:
    """Stop the batch norms of a module that is trained as a copy: it still runs, and its statistics are the base's.

    Without ``track_running_stats`` a batch norm reads its statistics as before and does not move them.
    """
    for _, norm in base_modules(module):
        if isinstance(norm, _BatchNorm) and norm.track_running_stats:
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


def forget_compiled() -> None:
    """Let compiled code notice our hooks: drop what was compiled before, and have dynamo look at hooks from now on.

    By default it does not, so what it compiled for a model would run, without adapters, for another of the same class
    that has some. Building an optimizer imports dynamo too, if nothing has before.
    """
    before = "torch._dynamo" in sys.modules
    dynamo = importlib.import_module("torch._dynamo")
    dynamo.config.skip_nnmodule_hook_guards = False
    if before:
        dynamo.reset()
