"""Whether an adapter adds nothing: it is as its method made it, with a start of zero, and nothing has trained it."""

import torch
from torch import nn

from tunerkit import hooks
from tunerkit.injection.slots import Slot, slots_of
from tunerkit.injection.tuner import Tuner, modules_in, slots_in
from tunerkit.layers import bias_name

_SAMPLE = 3  # adapters whose delta is computed, which costs as much as a matrix of the base


@torch.no_grad()
def adds_nothing(tuner: Tuner) -> bool:
    """Whether the model's output is the same without the adapter. A count of steps would miss a loop of one's own."""
    modules = modules_in(tuner)
    return all(
        _keeps_base(slot, modules[path]) and (slot.adapter is None or _has_no_delta(path, slot, modules[path]))
        for path, slot in slots_in(tuner)
    )


@torch.no_grad()
def is_untrained(tuner: Tuner, *, copies: bool = True) -> bool:
    """Whether the adapter surely adds nothing. The first values of a trained adapter show that it does.

    With ``copies=False`` trained copies and biases do not count, only what the method built.

    A method with a start of zero has a parameter that is 0 throughout until it is trained, in every adapter. Where
    that holds for all, the deltas of a few adapters confirm it. A method with another start is never untrained here.
    """
    modules, idle = modules_in(tuner), []
    for path, slot in slots_in(tuner):
        if slot.adapter is not None:
            parameters = list(slot.adapter.parameters())
            if all(bool(p.any()) for p in parameters) or not all(bool(p.isfinite().all()) for p in parameters):
                return False  # 0 times NaN is NaN
            idle.append((path, slot))
        if copies and not _keeps_base(slot, modules[path]):
            return False
    sample = idle[:: max(1, len(idle) // _SAMPLE)]
    return bool(sample) and all(_has_no_delta(path, slot, modules[path]) for path, slot in sample)


@torch.no_grad()
def untrained_copies(tuner: Tuner) -> list[str]:
    """The modules that are trained in full whose copy still has the base's values."""
    modules = modules_in(tuner)
    return [path for path, slot in slots_in(tuner) if slot.copy is not None and _keeps_base(slot, modules[path])]


def _has_no_delta(path: str, slot: Slot, module: nn.Module) -> bool:
    slots = slots_of(module)
    if slots is None or slots.base is None or slot.adapter is None or not hooks.has_delta(slot.method):
        return False
    if hooks.adds_products(slot.method):
        q, p = hooks.factors(path, slot.method, slot.adapter, slots.base)
        for zero, other in ((p, q), (q, p)):
            if not zero.any() and other.isfinite().all():
                return True  # a dense matrix is not needed to see it
    delta = hooks.delta(path, slot.method, slot.adapter, slots.base)
    return not any(part is not None and bool(part.any()) for part in (delta.weight, delta.bias))


def _keeps_base(slot: Slot, module: nn.Module) -> bool:
    """Whether the copy or the bias in the slot, if it has one, equals the base's own, also where that is merged."""
    slots = slots_of(module)
    assert slots is not None
    copied = {} if slot.bias is None else {bias_name(slots.base): slot.bias.data}
    if slot.copy is not None:
        copied = _tensors(slot.copy)
    own = _tensors(module) if copied else {}
    for name, tensor in copied.items():
        original = slots.original(name, own[name]) if name in own else None
        if original is None or original.is_meta or not torch.equal(tensor, original.to(tensor.device)):
            return False
    return True


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())
