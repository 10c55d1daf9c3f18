"""The fingerprint of a base model: names, shapes and sampled values. Its cost depends on the number of tensors."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tunerkit import injection, layers
from tunerkit.errors import AdapterError
from tunerkit.injection import Tuner
from tunerkit.layers import BaseLayer, is_packed, torch_private, weights, whole_shape
from tunerkit.paths import few, is_under, join
from tunerkit.records import Target
from tunerkit.serialization.packed import entry_of, is_packed_entry, packed_layers
from tunerkit.targets import Scan

SAMPLES = 4
GATHERED = 2**26  # values that are gathered at a time, at least one parameter
# A base that was loaded in another precision is the same base: bfloat16 has 8 bits of mantissa.
_RELATIVE = 2.0**-7
# Samples are stored with six digits.
_DIGITS = 1e-5
Fingerprint = Mapping[str, Mapping[str, Any]]
OTHER_VALUES = "other values"


def fingerprint(tuner: Tuner, scanned: Scan | None = None) -> dict[str, dict[str, Any]]:
    """Return ``{parameter: {"shape": [...], "dtype": "float32", "sample": [...]}}`` of the base under ``tuner``.

    A tensor on the meta device has no values, so its sample is empty and only its shape is compared. What the adapter
    trains in full (copies and biases) is left out, because a new head has other values at each load. So is a new head
    that another adapter trained beside it.

    Before the adapter is in the model, parameters that an engine has emptied are gathered, a few at a time, so all
    processes must call this together. Where the base was sharded since, this is what was noted then.

    A weight that a quantiser stores has one entry, with the name and the shape of the unquantised weight, the
    quantiser's name as its dtype, and an empty sample. What it is packed in has none.

    Args:
        tuner: The adapter's handle.
        scanned: The scan of the model; only needed before the adapter is in the model, to find its biases.
    """
    if (tuner.progress.noted or scanned is None) and weights.sharding(tuner.model.parameters()) is not None:
        return _noted(tuner)
    packed = packed_layers(tuner, scanned)
    tensors = base_tensors(tuner, scanned, packed)
    emptied = {name: tensor for name, tensor in tensors.items() if weights.emptied([tensor]) is not None}
    samples = _sample({name: tensor for name, tensor in tensors.items() if name not in emptied})
    for some in _few_at_a_time(emptied):
        with weights.gathered(whole := nn.ParameterList(some.values())):
            samples |= _sample({name: tensor.detach() for name, tensor in zip(some, whole, strict=True)})
    return {
        name: {"shape": list(whole_shape(t)), "dtype": str(t.dtype).removeprefix("torch."), "sample": samples[name]}
        for name, t in tensors.items()
    } | {join(path, "weight"): entry_of(base) for path, base in packed.items() if not is_under(path, _left_out(tuner))}


def _noted(tuner: Tuner) -> dict[str, dict[str, Any]]:
    if tuner.progress.noted is None:
        raise AdapterError(
            f"the base under adapter {tuner.name!r} is sharded, and its fingerprint was not taken before: call "
            "torch.distributed.init_process_group before tunerkit.wrap, or start the processes with torchrun"
        )
    return tuner.progress.noted


def differences(saved: Fingerprint, found: Fingerprint) -> list[str]:
    """List what differs between two fingerprints, one line per kind of difference; empty if they agree."""
    pairs = {name: (entry, found[name]) for name, entry in saved.items() if name in found}
    resized = frozenset(reshaped(saved, found))
    kinds = {
        "parameters that this base lacks": [name for name in saved if name not in found],
        "parameters that only this base has": [name for name in found if name not in saved],
        "other shapes (saved -> here)": [
            f"{n} {a['shape']} -> {b['shape']}" for n, (a, b) in pairs.items() if n in resized
        ],
        OTHER_VALUES: [name for name, pair in pairs.items() if name not in resized and not _close(*pair)],
    }
    return [f"{what}: {few(names, shown=5)}" for what, names in kinds.items() if names]


def reshaped(saved: Fingerprint, found: Fingerprint) -> list[str]:
    """The names that two fingerprints share, with different shapes."""
    return [name for name, entry in saved.items() if name in found and not _same_shape(entry, found[name])]


def _same_shape(saved: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether two shapes are equal. A quantiser stores the (in, out) of a Conv1D as (out, in)."""
    packed = is_packed_entry(saved) or is_packed_entry(found)
    return bool(saved["shape"] == found["shape"] or (packed and saved["shape"] == found["shape"][::-1]))


def trained_biases(tuner: Tuner, scanned: Scan | None) -> dict[str, str]:
    """The name of the bias that is trained in each module, by the module's path; see `fingerprint`."""
    return {place.path: layers.bias_name(_base_of(place, scanned)) for place in tuner.biases}


def base_tensors(tuner: Tuner, scanned: Scan | None, quantised: Mapping[str, BaseLayer]) -> dict[str, Tensor]:
    """Return the base's own parameters by name: originals where merged, and without those that are trained in full.

    If the weight of a target is a buffer, so that the module packs it, all buffers of the module are included. Of the
    layers in ``quantised``, by path, only the bias is.
    """
    copied = _left_out(tuner)
    biased = {join(path, name) for path, name in trained_biases(tuner, scanned).items()}
    packed = {target.path for target in tuner.targets if _is_packed(target, scanned)}
    found = {}
    for path, module in injection.base_modules(tuner.model):
        if is_under(path, copied):
            continue
        slots = injection.slots_of(module)
        if path in quantised:
            leaf, bias = quantised[path].bias_name, quantised[path].bias()
            if bias is not None and join(path, leaf) not in biased:
                found[join(path, leaf)] = bias if slots is None else slots.original(leaf, bias)
            continue
        buffers = dict(module.named_buffers(recurse=False)) if path in packed else {}
        for leaf, tensor in {**torch_private.own_parameters(module), **buffers}.items():
            name = join(path, leaf)
            if tensor is not None and name not in biased:
                found[name] = tensor.detach() if slots is None else slots.original(leaf, tensor)
                if weights.emptied([tensor]) is not None:  # it cannot be merged; only the parameter can be gathered
                    found[name] = tensor
    return found


def _few_at_a_time(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Divide emptied parameters, in their order, so that each group fits into memory."""
    some: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        own = whole_shape(tensor).numel()
        if some and size + own > GATHERED:
            yield some
            some, size = {}, 0
        some[name] = tensor
        size += own
    if some:
        yield some


def _left_out(tuner: Tuner) -> set[str]:
    """The paths of what is trained in full."""
    return {*(place.path for place in tuner.copies), *tuner.progress.beside}


def _is_packed(target: Target, scanned: Scan | None) -> bool:
    base = _base_of(target, scanned)
    return base is not None and base.weight_name in dict(target.module.named_buffers(recurse=False))


def _base_of(place: Target, scanned: Scan | None) -> BaseLayer | None:
    """Return the module's base layer as it was when the module was adapted, or as it is if it is not adapted yet."""
    slots = injection.slots_of(place.module)
    if slots is not None:
        return slots.base
    return scanned.by_path[place.path].base if scanned is not None else None


def _sample(tensors: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Return `SAMPLES` evenly spaced values of each tensor with values, with one transfer per device and dtype.

    ``torch.take`` handles any strides, so nothing is copied.
    """
    alike: dict[tuple[torch.device, torch.dtype], list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        if tensor.numel() and not tensor.is_meta and not is_packed(tensor):
            alike[tensor.device, tensor.dtype].append(name)
    samples: dict[str, list[float]] = {name: [] for name in tensors}
    for (device, _), names in alike.items():
        last = torch.tensor([tensors[name].numel() - 1 for name in names], device=device)
        places = last[:, None] * torch.arange(SAMPLES, device=device) // (SAMPLES - 1)  # (names, SAMPLES)
        taken = torch.stack([_take(tensors[name], row) for name, row in zip(names, places, strict=True)])
        for name, values in zip(names, taken.float().tolist(), strict=True):
            samples[name] = [_short(value) for value in values]
    return samples


def _take(tensor: Tensor, places: Tensor) -> Tensor:
    """Return the values at flat positions. `torch.take` does not support 8-bit floats, so their bytes are read."""
    if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1:
        return torch.take(tensor.view(torch.uint8), places).view(tensor.dtype)
    return torch.take(tensor, places)


def _short(value: float) -> float:
    # JSON has no NaN or inf, but a base that contains them needs a fingerprint too.
    return float(f"{value:.6g}") if math.isfinite(value) else 0.0


def _close(saved: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether two samples are of the same tensor: within the stored digits, or within bfloat16's if dtypes differ."""
    if not saved["sample"] or not found["sample"]:
        return True
    relative = _DIGITS if saved["dtype"] == found["dtype"] else _RELATIVE
    return len(saved["sample"]) == len(found["sample"]) and all(
        math.isclose(a, b, rel_tol=relative, abs_tol=1e-7)
        for a, b in zip(saved["sample"], found["sample"], strict=True)
    )
