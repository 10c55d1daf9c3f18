"""Checks that merging is right where several adapters share a target and do not say what they read."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tunerkit.errors import AdapterError
from tunerkit.injection import Slots
from tunerkit.layers import autocast_off

# Two ways of computing the same output may differ by this share of its largest value, in fp32 and wider.
_TOLERANCE = 1e-5
_EPSILONS = 8  # in narrower precisions: every addition rounds


@torch.no_grad()
def refuse_unequal(path: str, module: nn.Module, slots: Slots, merged: Mapping[str, Tensor]) -> None:
    """Raise `AdapterError` if a module computes something else with its merged tensors than with its adapters.

    Only modules with several adapters are tested, of which one does not declare ``reads_output``. An adapter that reads
    the output so far makes a sum of deltas wrong, and nothing else would show it. A module whose kind has no
    `BaseLayer.example_input` is not tested.

    Args:
        path: The module's path.
        module: The adapted module, not merged.
        slots: Its slots.
        merged: Its own tensors with all active adapters merged, by local name.
    """
    adapters = [(slot.method, slot.adapter) for slot in slots.applied if slot.adapter is not None]
    silent = dict.fromkeys(repr(name) for name, adapter in adapters if adapter.reads_output is None)
    if not (len(adapters) > 1 and silent) or slots.base is None or slots.base.lends:
        return
    with torch.random.fork_rng(devices=[]), autocast_off(_device_of(slots)):
        torch.default_generator.manual_seed(0)
        x = slots.base.example_input()
        if x is None:
            return
        training = [part for part in module.modules() if part.training]
        try:
            for part in training:
                part.training = False
            adapted = module(x)
            slots.enabled = False
            expected = functional_call(module, dict(merged), (x,))
        finally:
            slots.enabled = True
            for part in training:
                part.training = True
    share = max(_TOLERANCE, _EPSILONS * torch.finfo(adapted.dtype).eps if adapted.dtype.itemsize < 4 else 0.0)
    worst, largest = float((adapted - expected).abs().max()), float(adapted.abs().max())
    if worst > share * largest:
        raise AdapterError(
            f"cannot merge at {path!r}: several adapters share it ({', '.join(slots.active)}), and the merged layer "
            f"computes something else than the adapted one (by {worst / largest:.2g} of the largest output). Method "
            f"{' or '.join(silent)} reads the output so far, or its delta is not what its adapter adds. An adapter "
            "class that reads it should set reads_output = True; until then, merge one adapter at a time"
        )


def _device_of(slots: Slots) -> torch.device:
    return next((tensor.device for tensor in slots.parameters()), torch.device("cpu"))
