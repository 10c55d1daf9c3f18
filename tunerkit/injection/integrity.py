"""Checks that each adapted module is still in the model, has its size, and runs its adapters."""

from collections.abc import Iterable, Iterator

from torch import nn

from tunerkit.errors import AdapterError
from tunerkit.injection.slots import Slots, apply_slots, base_modules, is_resized, slots_of
from tunerkit.injection.tuner import Tuner
from tunerkit.injection.weight_override import overridden_in
from tunerkit.libraries import is_packed, torch_private


def refuse_lost(tuners: Iterable[Tuner]) -> None:
    """Raise `AdapterError` naming the modules that were replaced, resized or stripped of their hook after wrapping.

    An adapter has no effect there, or does not fit, and no forward would show it.
    """
    lost = dict.fromkeys(found for tuner in tuners for found in _lost(tuner))  # several adapters may lose one module
    if lost:
        grouped = {reason: [path for path, other in lost if other == reason] for _, reason in lost}
        lines = "\n".join(f"- {', '.join(paths)}: {reason}" for reason, paths in grouped.items())
        raise AdapterError(
            f"adapters have no effect, or do not fit, where the model was changed after wrapping:\n{lines}\n"
            "Convert, replace or resize modules first, then call tunerkit.wrap or tunerkit.load"
        )


def _lost(tuner: Tuner) -> Iterator[tuple[str, str]]:
    list(tuner.slots())  # raises if the adapter itself was removed from a module
    modules = [module for _, module in base_modules(tuner.model)]
    # By identity, not by path: a module that was put into DDP or a compiled module still runs.
    present = set(map(id, modules))
    overridden = overridden_in(modules)
    for path, module in tuner.modules().items():
        slots = slots_of(module)
        if id(module) not in present:
            yield path, f"the {type(module).__name__} that was adapted is not in the model any more"
        elif not torch_private.has_hook(module, apply_slots) and id(module) not in overridden:
            yield path, "its forward hook is gone"
        elif slots is not None and _was_packed(module, slots):
            yield path, f"the weight of the {type(module).__name__} was quantised after it had been adapted"
        elif slots is not None and _is_resized(module, slots):
            yield path, f"the {type(module).__name__} has another size than when it was adapted"


def _was_packed(module: nn.Module, slots: Slots) -> bool:
    """Whether the module has a packed weight by now, with which the kind that it was adapted as does not work."""
    packed = any(map(is_packed, torch_private.own_parameters(module).values()))
    return packed and slots.base is not None and not slots.base.matches(module)


def _is_resized(module: nn.Module, slots: Slots) -> bool:
    if slots.base is not None and slots.features is not None:
        return (slots.base.out_features, slots.base.in_features) != slots.features
    return any(is_resized(module, copy) for copy in slots.copies.values())
