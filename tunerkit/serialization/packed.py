"""Base layers with a `BaseLayer.packing`, which their kinds read and write: rounding on merge, dense replacements."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from tunerkit import hooks, injection, layers, targets
from tunerkit.errors import AdapterError, warn
from tunerkit.injection import Slots, Tuner
from tunerkit.layers import BaseLayer, as_base_layer
from tunerkit.records import Rounding
from tunerkit.serialization.fingerprint import packed_layers

_FEW_BITS = 4

# --- Merging ---------------------------------------------------------------------------------------------------------


def rounding(model: nn.Module) -> dict[str, Rounding]:
    """Return what merging into quantized layers has rounded.

    Args:
        model: A merged model.

    Returns:
        The errors by the layer's path; empty without quantized layers, or if the model is not merged.

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
        warn(
            f"merged into {len(coarse)} weights of {coarse[0].bits:g} bits ({coarse[0].stored_as}): storing the sums "
            f"again added an error of {fmean(each.added for each in coarse):.1%} of the weights on average, beside the "
            f"quantiser's own of {fmean(each.own for each in coarse):.1%}; the adapters had changed them by "
            f"{fmean(each.change for each in coarse):.1%}. tunerkit.unwrap(model, keep_merged=True, "
            "dtype=torch.bfloat16) merges without that error, into dense layers. tunerkit.rounding(model) lists each "
            "layer"
        )


@contextmanager
def requiring_effect(path: str, slots: Slots, merged: Collection[str], noted: list[Rounding]) -> Iterator[None]:
    """Raise `AdapterError` if the block, which writes ``merged``, leaves the weight nearer to W than to W + ΔW.

    An unknown class may ignore an assignment, or round it away. What a quantizer rounds is added to ``noted``; that may
    be all of ΔW, if it is below the quantizer's own error.
    """
    base = slots.base
    if base is None or _is_assigned(base, merged):
        yield
        return
    deltas = [hooks.delta(path, slot.method, slot.adapter, base) for slot in slots.applied if slot.adapter is not None]
    delta = sum((each.weight.float() for each in deltas if each.weight is not None), torch.zeros(()))
    before = base.dense().float().clone()
    yield
    after = base.dense().float()
    if base.packing is None:
        reached = bool((after - before - delta).norm() <= delta.norm() / 2)
    else:
        slots.rounding = found = base.rounded(before, delta, noted)
        noted.append(found)
        reached = not torch.equal(after, before) or found.change <= found.own
    if not reached and delta.any():
        raise AdapterError(
            f"cannot merge into {path!r}: its {type(base.module).__name__} stores the weight in a packed form, and "
            "adding to it had no effect. Load the adapter onto the base in full precision and merge there"
        )


def _is_assigned(base: BaseLayer, merged: Collection[str]) -> bool:
    """Whether assigning to the weight takes effect: it is a plain matrix or a shard of one, or nothing is assigned."""
    if base.packing is not None:
        return all(name == base.bias_name for name in merged)
    if base.weight_name not in merged:
        return True
    weight = base.tensor(base.weight_name)
    return (type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point()) or layers.is_sharded(weight)


# --- Dense layers ----------------------------------------------------------------------------------------------------


# Never in inference mode: inference tensors in the model could not be trained later.
@torch.inference_mode(False)
@torch.no_grad()
def dense_layers(tuner: Tuner, dtype: torch.dtype, *, merged: bool) -> dict[str, nn.Module]:
    """A dense layer for each packed layer of the model, by path, with what active adapters add if ``merged``.

    The sum is computed in fp32, or in ``dtype`` if that is wider, and rounded once. The model is only read.
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
    if slots is not None and merged and not slots.permanent:
        for name, tensor in injection.adapted_tensors(path, dense, slots, as_base_layer(dense)).items():
            setattr(dense, name, nn.Parameter(tensor, requires_grad=False))
    dense.to(dtype)
    if not dense.weight.isfinite().all():
        raise AdapterError(f"the dense weight of {path!r} would contain NaN or inf in {dtype}; nothing was changed")
    return dense  # type: ignore[no-any-return]


def replace_by_dense_(model: nn.Module, dense: Mapping[str, nn.Module]) -> None:
    """Put dense layers into a model without adapters. It may be called again to complete an interrupted call."""
    if dense:
        places = dict(injection.base_modules(model))
        new = {places[path]: layer for path, layer in dense.items()}
        for path, module in list(model.named_modules(remove_duplicate=False)):
            if path and module in new:
                model.set_submodule(path, new[module])
        hooks.tell(hooks.specs.tunerkit_unwrapped, model=model)  # again: only now it holds no quantized layer
