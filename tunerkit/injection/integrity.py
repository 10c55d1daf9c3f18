"""The places of adapters: each must still be in the model, as large as it was, and run what was put there."""

from collections import defaultdict
from collections.abc import Iterable, Iterator

from torch import nn

from tunerkit.errors import AdapterError
from tunerkit.injection.slots import Slots, apply_slots, base_modules, slots_of
from tunerkit.injection.tuner import Tuner
from tunerkit.injection.weight_override import is_overridden
from tunerkit.libraries import torch_private


def refuse_lost(tuners: Iterable[Tuner]) -> None:
    """Raise `AdapterError` naming the places that were replaced, resized or stripped of their hook after wrapping.

    An adapter has no effect there, or fits nothing any more, and no forward would say so.
    """
    lost: dict[str, dict[str, None]] = defaultdict(dict)  # a place may be lost to several adapters
    for tuner in tuners:
        for path, reason in _lost(tuner):
            lost[reason][path] = None
    if lost:
        lines = "\n".join(f"- {', '.join(paths)}: {reason}" for reason, paths in lost.items())
        raise AdapterError(
            f"adapters have no effect, or do not fit, where the model was changed after wrapping:\n{lines}\n"
            "Convert, replace or resize modules first, then call tunerkit.wrap or tunerkit.load"
        )


def _lost(tuner: Tuner) -> Iterator[tuple[str, str]]:
    dict(tuner.slots())  # an adapter that was torn out is told by the tuner itself
    # By identity and not by path: a module may have been put into DDP or a compiled one, where it runs as before.
    present = {id(module) for _, module in base_modules(tuner.model)}
    for path, module in tuner.modules().items():
        slots = slots_of(module)
        assert slots is not None
        if id(module) not in present:
            yield path, f"the {type(module).__name__} that was adapted is not in the model any more"
        elif not torch_private.has_hook(module, apply_slots) and not is_overridden(tuner.model, module):
            yield path, "its forward hook is gone"
        elif _is_resized(module, slots):
            yield path, f"the {type(module).__name__} has another size than when it was adapted"


def _is_resized(module: nn.Module, slots: Slots) -> bool:
    if slots.base is not None:
        return (slots.base.out_features, slots.base.in_features) != slots.features
    own = dict(module.named_parameters())
    copies = [slot.copy for name in slots.names if (slot := slots.get(name)) is not None and slot.copy is not None]
    return any(name in own and own[name].shape != p.shape for copy in copies for name, p in copy.named_parameters())
