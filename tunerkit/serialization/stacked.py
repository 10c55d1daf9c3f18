"""Checks that merging is right where adapters read a layer's output, or share it and do not say what they read."""

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tunerkit import injection
from tunerkit.errors import AdapterError
from tunerkit.injection import Slots
from tunerkit.layers import BaseLayer, autocast_off

# Two ways of computing the same output in fp64 may differ by this share of its largest value.
_TOLERANCE = 1e-5


@torch.no_grad()
def refuse_unequal(path: str, module: nn.Module, slots: Slots) -> None:
    """Raise `AdapterError` if a module computes something else with its merged tensors than with its adapters.

    Modules are tested whose adapters read the output, or do not say whether they do and are one of several or beside a
    padding row. An adapter that reads the output so far makes a sum of deltas wrong, and nothing else would show it.
    The test runs in fp64, so that rounding hides nothing.

    A module is not tested if its kind has no `BaseLayer.example_input`, or packs its weight, which rounds. Nor is one
    that is not called, as in attention: there, the delta is all that an adapter does.

    Args:
        path: The module's path.
        module: The adapted module, not merged.
        slots: Its slots.
    """
    adapters = [(slot.method, slot.adapter) for slot in slots.applied if slot.adapter is not None]
    # A padding row is in the output that an adapter may scale, and in no weight that a delta may change.
    unsure = len(adapters) > 1 or (isinstance(module, nn.Embedding) and module.padding_idx is not None)
    suspects = dict.fromkeys(
        repr(name) for name, each in adapters if each.reads_output or (unsure and each.reads_output is None)
    )
    if not suspects or slots.base is None or not injection.is_called(module) or _is_packed(slots.base):
        return
    outputs = _both_outputs(module)
    if outputs is None:
        return
    adapted, expected = outputs
    worst, largest = float((adapted - expected).abs().max()), float(adapted.abs().max())
    if worst > _TOLERANCE * largest:
        raise AdapterError(
            f"cannot merge at {path!r}: the merged {type(module).__name__} computes something else than the adapted "
            f"one (by {worst:.2g} where outputs reach {largest:.2g}, adapters: {', '.join(slots.active)}). Method "
            f"{' or '.join(suspects)} reads the output so far, or its delta is not what its adapter adds. "
            "A class that reads it should set reads_output = True; if it does, leave this module out of the targets "
            "(exclude=...), or merge one adapter at a time"
        )


def _both_outputs(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """The adapted and the merged output of a random input, in eval mode; None if the kind has no such input.

    A copy of the module computes both, on the CPU and in fp64.
    """
    with torch.random.fork_rng(devices=[]), autocast_off(torch.device("cpu")):
        torch.default_generator.manual_seed(0)
        twin = copy.deepcopy(module).cpu().double().eval()
        slots = injection.slots_of(twin)
        assert slots is not None
        assert slots.base is not None
        for slot in slots.applied:
            if slot.adapter is not None and slot.adapter.has_shared:
                slot.adapter.shared.cpu().double()
        x = slots.base.example_input()
        if x is None:
            return None
        adapted = twin(x)
        merged = injection.adapted_tensors("", twin, slots)
        slots.enabled = False
        return adapted, functional_call(twin, merged, (x,))


def _is_packed(base: BaseLayer) -> bool:
    return base.packing is not None or not base.tensor(base.weight_name).is_floating_point()
