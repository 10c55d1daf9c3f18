"""Whether an adapter adds nothing: it is as its method made it, with a start of zero, and nothing has trained it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tunerkit import hooks
from tunerkit.injection.slots import Slot, slots_of
from tunerkit.injection.tuner import Tuner
from tunerkit.layers import BaseLayer, bias_name

_SAMPLE = 3  # adapters whose delta is computed, which costs as much as a matrix of the base


@torch.no_grad()
def adds_nothing(tuner: Tuner) -> bool:
    """Whether the model's output is the same without the adapter. A count of steps would miss a loop of one's own."""
    modules = tuner.modules()
    return all(_is_idle(path, slot, modules[path]) for path, slot in tuner.slots())


@torch.no_grad()
def is_untrained(tuner: Tuner, *, copies: bool = True) -> bool:
    """Whether the adapter surely adds nothing. The first values of a trained adapter show that it does.

    With ``copies=False`` trained copies and biases do not count, only what the method built.

    A method with a start of zero has a parameter that is 0 throughout until it is trained, in every adapter. Where
    that holds for all, the deltas of a few adapters confirm it. A method with another start is never untrained here.
    """
    modules, idle = tuner.modules(), {}
    for path, slot in tuner.slots():
        if slot.adapter is not None:
            if not _may_be_idle(list(slot.adapter.parameters())):
                return False
            idle[path] = slot
        if copies and not _keeps_base(slot, modules[path]):
            return False
    paths = list(idle)
    sample = paths[:: max(1, len(paths) // _SAMPLE)]
    return bool(sample) and all(_has_no_delta(path, idle[path], _base_of(modules[path])) for path in sample)


@torch.no_grad()
def untrained_copies(tuner: Tuner) -> list[str]:
    """The modules that are trained in full whose copy still has the base's values."""
    modules = tuner.modules()
    return [path for path, slot in tuner.slots() if slot.copy is not None and _keeps_base(slot, modules[path])]


def _may_be_idle(parameters: Sequence[Tensor]) -> bool:
    """Whether one of an adapter's parameters is 0 throughout, and none contains NaN or inf: 0 times NaN is NaN."""
    return not all(bool(p.any()) for p in parameters) and all(bool(p.isfinite().all()) for p in parameters)


def _is_idle(path: str, slot: Slot, module: nn.Module) -> bool:
    return _keeps_base(slot, module) and (slot.adapter is None or _has_no_delta(path, slot, _base_of(module)))


def _has_no_delta(path: str, slot: Slot, base: BaseLayer | None) -> bool:
    if base is None or slot.adapter is None or not hooks.has_delta(slot.method):
        return False
    if hooks.adds_products(slot.method):
        product = hooks.factors(path, slot.method, slot.adapter, base)
        if _is_zero_times(product.p, product.q) or _is_zero_times(product.q, product.p):
            return True  # a dense matrix is not needed to see it
    delta = hooks.delta(path, slot.method, slot.adapter, base)
    return not any(part is not None and bool(part.any()) for part in (delta.weight, delta.bias))


def _is_zero_times(zero: Tensor, other: Tensor) -> bool:
    """Whether the first factor is 0 throughout, and so the product is: 0 times NaN or inf is NaN."""
    return not zero.any() and bool(other.isfinite().all())


def _keeps_base(slot: Slot, module: nn.Module) -> bool:
    """Whether the copy or the bias in the slot, if it has one, equals the base's own."""
    if slot.copy is not None:
        own = {name: _original(module, name, tensor) for name, tensor in _tensors(module).items()}
        return all(name in own and _is_equal(kept, own[name]) for name, kept in _tensors(slot.copy).items())
    if slot.bias is not None:
        name = bias_name(_base_of(module))
        return _is_equal(slot.bias, _original(module, name, module.get_parameter(name)))
    return True


def _base_of(module: nn.Module) -> BaseLayer | None:
    slots = slots_of(module)
    return None if slots is None else slots.base


def _original(module: nn.Module, name: str, live: Tensor) -> Tensor:
    """The base's own tensor, also where a merged one replaces it."""
    slots = slots_of(module)
    return live if slots is None else slots.original(name, live)


def _tensors(module: nn.Module) -> Mapping[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _is_equal(one: Tensor, other: Tensor) -> bool:
    return not other.is_meta and torch.equal(one, other.to(one.device))
