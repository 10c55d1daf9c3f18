"""What an adapter adds to its model, however its method holds it, for the files of other programs."""

from collections.abc import Iterable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from tunerkit import hooks
from tunerkit.errors import AdapterError
from tunerkit.injection.slots import Slot, Slots
from tunerkit.layers import Adapter, BaseLayer
from tunerkit.records import Factors

_INSTEAD = "Call tunerkit.unwrap(model, keep_merged=True) and save the whole model instead"
Places: TypeAlias = Iterable[tuple[str, Slots, Slot]]  # a module's path, all its slots, and the adapter's


@torch.no_grad()
def factors_in(places: Places, method: str) -> dict[str, Factors]:
    """Return what an adapter adds to the weight of each target as a product, on the CPU and without gradients.

    Raises:
        AdapterError: The method adds something that is no product, or also adds to biases.
        PluginError: The method's plugin returns something else.
    """
    if not hooks.has_factors(method):
        raise AdapterError(
            f"method {method!r} adds no product of two small matrices (its plugin does not implement "
            f"tunerkit_factors), which is all that the formats of other programs hold. {_INSTEAD}"
        )
    adapted = list(_adapted(places))
    if not hooks.adds_products(method):
        _refuse_biases(method, adapted)
    return {
        path: Factors(*(tensor.detach().cpu() for tensor in hooks.factors(path, method, adapter, base)))
        for path, adapter, base in adapted
    }


def copies_in(places: Places) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of the modules trained in full, on the CPU, by module path and by name in the module."""
    return {
        path: {name: tensor.detach().cpu() for name, tensor in slot.copy.state_dict().items()}
        for path, _, slot in places
        if slot.copy is not None
    }


def biases_in(places: Places) -> dict[str, Tensor]:
    """Return the trained biases, (out,), on the CPU, by module path."""
    return {path: slot.bias.detach().cpu() for path, _, slot in places if slot.bias is not None}


def _adapted(places: Places) -> Iterator[tuple[str, Adapter, BaseLayer]]:
    for path, slots, slot in places:
        if slot.adapter is not None and slots.base is not None:
            yield path, slot.adapter, slots.base


def _refuse_biases(method: str, adapted: Iterable[tuple[str, Adapter, BaseLayer]]) -> None:
    """Refuse a method whose factors are not all that it adds. One target of each shape is asked: deltas are large."""
    seen = set()
    for path, adapter, base in adapted:
        if (shape := (base.out_features, base.in_features)) not in seen:
            seen.add(shape)
            if hooks.delta(path, method, adapter, base).bias is not None:
                raise AdapterError(
                    f"method {method!r} also adds to the bias of {path!r}, which the formats of other programs cannot "
                    f"hold. {_INSTEAD}"
                )
