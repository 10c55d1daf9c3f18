"""Replace the quantised layers of a model by dense ones, with or without what its adapters add."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tunerkit import hooks, injection, libraries
from tunerkit.errors import AdapterError
from tunerkit.injection import Slots, Tuner
from tunerkit.layers import BaseLayer
from tunerkit.paths import CHILD
from tunerkit.serialization.packings import packed_layers
from tunerkit.serialization.sharded_weights import is_split


# Never in inference mode: inference tensors in the model could not be trained later.
@torch.inference_mode(False)
@torch.no_grad()
def dense_layers(tuner: Tuner, dtype: torch.dtype, *, merged: bool) -> dict[str, nn.Module]:
    """Build a dense layer for each layer of the model whose weight a quantiser stores. The model is only read.

    Args:
        tuner: The handle on any adapter of the model.
        dtype: The dtype of the new layers.
        merged: Whether to add what the active adapters add. The sum is computed in fp32 and rounded once, to ``dtype``.

    Returns:
        The new layers by the path of those that they replace.

    Raises:
        AdapterError: An adapter cannot be merged, the sum contains NaN or inf, or a packed weight is sharded.
    """
    return {path: _dense(path, base, dtype, merged=merged) for path, base in packed_layers(tuner, None).items()}


def _dense(path: str, base: BaseLayer, dtype: torch.dtype, *, merged: bool) -> nn.Module:
    if is_split(base.module):
        raise AdapterError(
            f"cannot make a dense layer of {path!r}: FSDP2 has cut its quantised weight into shards. Save the adapter, "
            "load it onto the base in one process, and unwrap there"
        )
    slots = injection.slots_of(base.module)
    weight, bias = base.dense().float(), base.bias()
    if slots is not None and merged and not slots.merged:
        weight, bias = _with_adapters(path, base, slots, weight, bias)
    weight = weight.to(dtype)
    if not weight.isfinite().all():
        raise AdapterError(f"the dense weight of {path!r} would contain NaN or inf in {dtype}; nothing was changed")
    dense = base.unpacked(weight)
    if bias is not None:
        dense.bias = nn.Parameter(bias.to(dtype, copy=True), requires_grad=False)
    return dense


def _with_adapters(
    path: str, base: BaseLayer, slots: Slots, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    own = bias
    for slot in slots.applied:
        if slot.adapter is not None:
            if not hooks.has_delta(slot.method):
                raise AdapterError(
                    f"method {slot.method!r} cannot be merged: its plugin implements neither tunerkit_delta nor "
                    "tunerkit_factors"
                )
            delta = hooks.delta(path, slot.method, slot.adapter, base)
            weight = weight if delta.weight is None else weight + delta.weight.float()
            bias = bias if delta.bias is None else delta.bias.float() + (0 if bias is None else bias.float())
        if slot.bias is not None and own is not None and bias is not None:
            bias = bias.float() + (slot.bias - own).float()
    return weight, bias


def replace_by_dense_(model: nn.Module, dense: Mapping[str, nn.Module]) -> None:
    """Put dense layers into a model without adapters. It may be called again to complete an interrupted call."""
    places = dict(injection.base_modules(model))
    new = {id(places[path]): layer for path, layer in dense.items() if path in places}
    for _, module in injection.base_modules(model):
        for name, child in list(libraries.torch_private.own_children(module).items()):
            if child is not None and name != CHILD and id(child) in new:
                setattr(module, name, new[id(child)])
    if not any(map(libraries.quantiser_of, (module for _, module in injection.base_modules(model)))):
        libraries.forget_quantisation(model)
