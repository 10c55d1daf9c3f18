"""What an adapter adds to its model, however its method holds it, for the files of other programs."""

from collections.abc import Iterable

import torch
from torch import Tensor

from tunerkit import hooks
from tunerkit.errors import AdapterError
from tunerkit.injection.models import slots_of
from tunerkit.injection.tuner import Tuner, slots_in
from tunerkit.layers import Adapter, BaseLayer
from tunerkit.records import Factors

_INSTEAD = "Call tunerkit.unwrap(model, keep_merged=True) and save the whole model instead"


@torch.no_grad()
def factors_of(tuner: Tuner) -> dict[str, Factors]:
    """Return what an adapter adds to the weight of each target as a product, on the CPU and without gradients.

    Args:
        tuner: The adapter's handle.

    Returns:
        The products by target path: q (r, in), p (out, r). The rank r differs between targets and may be 0.

    Raises:
        AdapterError: The method adds something that is no product, or also adds to biases.
        PluginError: The method's plugin returns something else.
    """
    method = tuner.method
    if not hooks.has_factors(method):
        raise AdapterError(
            f"method {method!r} adds no product of two small matrices (its plugin does not implement "
            f"tunerkit_factors), which is all that the formats of other programs hold. {_INSTEAD}"
        )
    adapters, bases = tuner.adapters(), {target.path: slots_of(target.module) for target in tuner.targets}
    adapted = [
        (path, adapter, slots.base)
        for path, adapter in adapters.items()
        if (slots := bases[path]) is not None and slots.base is not None
    ]
    if not hooks.adds_products(method):
        _refuse_biases(method, adapted)
    return {
        path: Factors(*(tensor.detach().cpu() for tensor in hooks.factors(path, method, adapter, base)))
        for path, adapter, base in adapted
    }


def copies_of(tuner: Tuner) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of the modules that an adapter trains in full, on the CPU.

    Args:
        tuner: The adapter's handle.

    Returns:
        The tensors by module path and by their name in the module.
    """
    return {
        path: {name: tensor.detach().cpu() for name, tensor in slot.copy.state_dict().items()}
        for path, slot in slots_in(tuner)
        if slot.copy is not None
    }


def biases_of(tuner: Tuner) -> dict[str, Tensor]:
    """Return the other biases that an adapter trains, on the CPU.

    Args:
        tuner: The adapter's handle.

    Returns:
        The biases, (out,), by module path.
    """
    return {path: slot.bias.detach().cpu() for path, slot in slots_in(tuner) if slot.bias is not None}


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
