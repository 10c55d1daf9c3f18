"""Base layers with quantized weights (`BaseLayer.packing`): rounding errors of a merge, and dense replacements."""

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
    """Return the rounding errors of a merge into quantized layers.

    Args:
        model: A merged model.

    Returns:
        The errors by layer path; empty without quantized layers, or if the model is not merged.

    Raises:
        AdapterError: The model has no adapter.
    """
    injection.require_tuners(model)
    noted = ((path, slots.rounding) for path, _, slots in injection.walk(model) if slots.merged)
    return {path: found for path, found in noted if found is not None}


def warn_of_rounding(found: Sequence[Rounding]) -> None:
    """Warn of merges into low-bit weights, where the rounding error may be as large as the adapters' ΔW."""
    coarse = [each for each in found if each.bits <= _FEW_BITS]
    if coarse:
        warn(
            f"merged into {len(coarse)} weight matrices of {coarse[0].bits:g} bits ({coarse[0].stored_as}). Relative "
            f"to the weights, on average: the adapters changed them by {fmean(each.change for each in coarse):.1%}, "
            f"quantizing the merged weights added an error of {fmean(each.added for each in coarse):.1%}; the base "
            f"model's own error was {fmean(each.own for each in coarse):.1%} before. tunerkit.unwrap(model, "
            "keep_merged=True, dtype=torch.bfloat16) merges into dense layers, without the added error. "
            "tunerkit.rounding(model) gives these shares of each layer"
        )


@contextmanager
def requiring_effect(path: str, slots: Slots, merged: Collection[str], noted: list[Rounding]) -> Iterator[None]:
    """Raise `AdapterError` if, after the block wrote ``merged``, the weight is nearer to W than to W + ΔW.

    A weight of an unknown class may ignore an assignment, or lose the change by rounding. For a quantized weight, the
    rounding error is appended to ``noted``; it may be as large as ΔW, if ΔW is below the quantizer's own error.
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
    """Whether writing ``merged`` surely takes effect: in a plain or sharded weight, or if no weight is written."""
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
    """Build a dense layer for each packed layer, by module path, with the active adapters added if ``merged``.

    The sum is computed in fp32, or in ``dtype`` if that is wider, and rounded once. The model is not changed.
    """
    found = packed_layers(tuner)
    for path, module in injection.base_modules(tuner.model):
        if path not in found and (library := targets.quantiser_of(module)) is not None:
            raise AdapterError(
                f"cannot make a dense layer of {path!r}, which {library} has quantized: no installed base-layer kind "
                f"supports a {type(module).__name__}. {hooks.unserved(module)}".rstrip(". ")
            )
    return {path: _dense(path, base, dtype, merged=merged) for path, base in found.items()}


def _dense(path: str, base: BaseLayer, dtype: torch.dtype, *, merged: bool) -> nn.Module:
    if (holder := layers.weights.sharding(base.module.parameters())) is not None:
        raise AdapterError(
            f"cannot make a dense layer of {path!r}: its quantized weight is sharded by {holder.name}. Save the "
            "adapter, load it onto the base in one process, and unwrap there"
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
    """Replace packed layers of an unwrapped model by dense ones; a second call completes an interrupted one."""
    if dense:
        places = dict(injection.base_modules(model))
        new = {places[path]: layer for path, layer in dense.items()}
        for path, module in list(model.named_modules(remove_duplicate=False)):
            if path and module in new:
                model.set_submodule(path, new[module])
        hooks.tell(hooks.specs.tunerkit_unwrapped, model=model)  # again: only now no layer is quantized
