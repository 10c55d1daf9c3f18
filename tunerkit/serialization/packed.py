"""Base layers with a `BaseLayer.packing`: what merging rounds in them, and dense ones instead.

A packed weight is no matrix to which a delta can be added. Its kind, in a plugin, reads it and stores another one.
"""

from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tunerkit import hooks, injection, layers, targets
from tunerkit.errors import AdapterError, warn
from tunerkit.injection import Slots, Tuner
from tunerkit.layers import BaseLayer, as_base_layer
from tunerkit.paths import CHILD
from tunerkit.records import Rounding
from tunerkit.serialization.fingerprint import packed_layers

_FEW_BITS = 4

# --- Merging ---------------------------------------------------------------------------------------------------------


def rounding(model: nn.Module) -> dict[str, Rounding]:
    """Return what merging into quantised layers has rounded.

    Args:
        model: A merged model.

    Returns:
        The errors by the layer's path; empty without quantised layers, or if the model is not merged.

    Raises:
        AdapterError: The model has no adapter.
    """
    injection.require_tuners(model)
    noted = ((path, slots.rounding) for path, _, slots in injection.walk(model) if slots.merged)
    return {path: found for path, found in noted if found is not None}


def warn_of_rounding(found: Sequence[Rounding]) -> None:
    """Warn of merges into weights of few bits: their rounding may be as large as what the adapters add."""
    coarse = [each for each in found if each.bits <= _FEW_BITS]
    if coarse:
        added, own, change = (
            sum(errors) / len(coarse)
            for errors in zip(*((each.added, each.own, each.change) for each in coarse), strict=True)
        )
        warn(
            f"merged into {len(coarse)} weights of {coarse[0].bits:g} bits ({coarse[0].stored_as}): storing the sums "
            f"again added an error of {added:.1%} of the weights on average, beside the quantiser's own of {own:.1%}; "
            f"the adapters had changed them by {change:.1%}. tunerkit.unwrap(model, keep_merged=True, "
            "dtype=torch.bfloat16) merges without that error, into dense layers. tunerkit.rounding(model) lists each "
            "layer"
        )


def is_whole(slots: Slots, name: str) -> bool:
    """Whether a merge replaces the attribute ``name`` itself: all that holds a packed weight is, and no bias."""
    return slots.base is not None and slots.base.packing is not None and name != slots.base.bias_name


@torch.no_grad()
def wanted_sum(path: str, slots: Slots, merged: Container[str]) -> tuple[Tensor, Tensor] | None:
    """Compute what a merge should make of a module's weight, before it is written.

    Args:
        path: The module's name in errors.
        slots: Its slots.
        merged: The local names of the tensors that the merge replaces.

    Returns:
        W as it is and the sum of the adapters' ΔW, both (out, in); None for a weight that is not replaced, or that is a
        plain matrix, which becomes what is assigned to it.
    """
    base = slots.base
    if base is None or (base.packing is None and _is_plain(base, merged)):
        return None
    deltas = [hooks.delta(path, slot.method, slot.adapter, base).weight for slot in slots.applied if slot.adapter]
    if base.packing is not None and all(each is None for each in deltas):
        return None
    total = sum((each.float() for each in deltas if each is not None), torch.zeros(()))
    return base.dense().float().clone(), total


def _is_plain(base: BaseLayer, merged: Container[str]) -> bool:
    if base.weight_name not in merged:
        return True
    weight = base.tensor(base.weight_name)
    return type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point()


@torch.no_grad()
def is_reached(slots: Slots, before: Tensor, delta: Tensor, noted: list[Rounding]) -> bool:
    """Whether a module's weight is nearer to W + ΔW than to W by now, since packing may round to four bits.

    Where a quantiser stores it, what it rounded is noted, and it may be W: `rounding` shows a ΔW below its own error.
    """
    assert slots.base is not None
    after = slots.base.dense().float()
    if slots.base.packing is None:
        return bool((after - before - delta).norm() <= delta.norm() / 2) or not delta.any()
    slots.rounding = found = slots.base.rounded(before, delta, noted)
    noted.append(found)
    return not torch.equal(after, before) or not delta.any() or found.change <= found.own


# --- Dense layers ----------------------------------------------------------------------------------------------------


# Never in inference mode: inference tensors in the model could not be trained later.
@torch.inference_mode(False)
@torch.no_grad()
def dense_layers(tuner: Tuner, dtype: torch.dtype, *, merged: bool) -> dict[str, nn.Module]:
    """Build a dense layer for each layer of the model whose weight a quantiser stores. The model is only read.

    Args:
        tuner: The handle on any adapter of the model.
        dtype: The dtype of the new layers.
        merged: Whether to add what the active adapters add. The sum is computed in fp32, or in ``dtype`` if that is
            wider, and rounded once.

    Returns:
        The new layers by the path of those that they replace.

    Raises:
        AdapterError: An adapter cannot be merged, the sum contains NaN or inf, a packed weight is sharded, or no kind
            knows a layer that a library has quantised.
    """
    found = packed_layers(tuner)
    for path, module in injection.base_modules(tuner.model):
        if path not in found and (library := targets.quantiser_of(module)) is not None:
            raise AdapterError(
                f"cannot make a dense layer of {path!r}, which {library} has quantised: no installed base-layer kind "
                f"knows a {type(module).__name__}. {hooks.unserved(module)}".rstrip(". ")
            )
    return {path: _dense(path, base, dtype, merged=merged) for path, base in found.items()}


def _dense(path: str, base: BaseLayer, dtype: torch.dtype, *, merged: bool) -> nn.Module:
    if (holder := layers.weights.sharding(base.module.parameters())) is not None:
        raise AdapterError(
            f"cannot make a dense layer of {path!r}: {holder.name} has cut its quantised weight into shards. Save "
            "the adapter, load it onto the base in one process, and unwrap there"
        )
    slots = injection.slots_of(base.module)
    dense: Any = base.unpacked(base.dense().to(torch.promote_types(torch.float32, dtype)))
    if slots is not None and merged and not slots.merged:
        injection.refuse_without_delta(slots)
        for name, tensor in injection.adapted_tensors(path, dense, slots, as_base_layer(dense)).items():
            setattr(dense, name, nn.Parameter(tensor, requires_grad=False))
    dense.to(dtype)
    if not dense.weight.isfinite().all():
        raise AdapterError(f"the dense weight of {path!r} would contain NaN or inf in {dtype}; nothing was changed")
    return dense  # type: ignore[no-any-return]


def replace_by_dense_(model: nn.Module, dense: Mapping[str, nn.Module]) -> None:
    """Put dense layers into a model without adapters. It may be called again to complete an interrupted call."""
    if not dense:
        return
    places = dict(injection.base_modules(model))
    new = {id(places[path]): layer for path, layer in dense.items() if path in places}
    for _, module in injection.base_modules(model):
        for name, child in list(layers.torch_private.own_children(module).items()):
            if child is not None and name != CHILD and id(child) in new:
                setattr(module, name, new[id(child)])
    hooks.tell(hooks.specs.tunerkit_unwrapped, model=model)  # again: only now it holds no quantised layer
