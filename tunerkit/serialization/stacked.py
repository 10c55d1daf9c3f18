"""Checks that merging is right where adapters read a layer's output, or share it and do not say what they read."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tunerkit import injection
from tunerkit.errors import AdapterError
from tunerkit.injection import Slots
from tunerkit.layers import BaseLayer, autocast_off

# Two ways of computing the same output may differ by this share of its largest value, in fp32 and wider.
_TOLERANCE = 1e-5
_EPSILONS = 8  # in narrower precisions: every addition rounds
_TF32 = 2.0**-10  # the precision of fp32 products on an accelerator, unless its user asks for more


@torch.no_grad()
def refuse_unequal(path: str, module: nn.Module, slots: Slots, merged: Mapping[str, Tensor]) -> None:
    """Raise `AdapterError` if a module computes something else with its merged tensors than with its adapters.

    Modules are tested whose adapters read the output, or that have several, of which one does not declare
    ``reads_output``. An adapter that reads the output so far makes a sum of deltas wrong, and nothing else would show
    it. A module is not tested if its kind has no `BaseLayer.example_input`, or packs its weight, which rounds. Nor is
    one that is not called, as in attention: there, the delta is all that an adapter does.

    Args:
        path: The module's path.
        module: The adapted module, not merged.
        slots: Its slots.
        merged: Its own tensors with all active adapters merged, by local name.
    """
    adapters = [(slot.method, slot.adapter) for slot in slots.applied if slot.adapter is not None]
    several = len(adapters) > 1
    suspects = dict.fromkeys(
        repr(name) for name, each in adapters if each.reads_output or (several and each.reads_output is None)
    )
    if not suspects or slots.base is None or not injection.is_called(module) or _is_packed(slots.base):
        return
    outputs = _both_outputs(module, slots, slots.base, merged)
    if outputs is None:
        return
    adapted, expected = outputs
    worst, largest = float((adapted - expected).abs().max()), float(adapted.abs().max())
    if worst > _share(adapted) * largest:
        raise AdapterError(
            f"cannot merge at {path!r}: the merged {type(module).__name__} computes something else than the adapted "
            f"one (by {worst / largest:.2g} of the largest output, adapters: {', '.join(slots.active)}). Method "
            f"{' or '.join(suspects)} reads the output so far, or its delta is not what its adapter adds. "
            "A class that reads it should set reads_output = True; if it does, leave this module out of the targets "
            "(exclude=...), or merge one adapter at a time"
        )


def _both_outputs(
    module: nn.Module, slots: Slots, base: BaseLayer, merged: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor] | None:
    """The adapted and the merged output of a random input, in eval mode; None if the kind has no such input."""
    device = base.tensor(base.weight_name).device
    forked = [] if device.type in ("cpu", "meta") else [device]
    with torch.random.fork_rng(forked, device_type=device.type if forked else "cuda"), autocast_off(device):
        torch.default_generator.manual_seed(0)
        x = base.example_input()
        if x is None:
            return None
        training = [part for part in module.modules() if part.training]
        try:
            for part in training:
                part.training = False
            adapted = module(x)
            slots.enabled = False
            return adapted, functional_call(module, dict(merged), (x,))
        finally:
            slots.enabled = True
            for part in training:
                part.training = True


def _is_packed(base: BaseLayer) -> bool:
    return not base.tensor(base.weight_name).is_floating_point()


def _share(output: Tensor) -> float:
    """By which share of its largest value an output may differ."""
    if output.dtype.itemsize < 4:
        return _EPSILONS * torch.finfo(output.dtype).eps
    rounds = output.dtype == torch.float32 and output.device.type not in ("cpu", "meta")
    return _EPSILONS * _TF32 if rounds else _TOLERANCE
