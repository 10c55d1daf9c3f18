"""The fingerprint of a base model: names, shapes and a few sampled values, at a cost by tensors and not by bytes."""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tunerkit.injection import Tuner, base_modules, slots_of
from tunerkit.layers import BaseLayer, bias_name
from tunerkit.libraries import torch_private
from tunerkit.paths import is_under, join
from tunerkit.records import Target
from tunerkit.targets import Scan

SAMPLES = 4
# A base loaded in another precision is the same base: bfloat16 keeps 8 bits of mantissa.
_RELATIVE = 2.0**-7
_SHOWN = 5
# Samples are kept with six digits.
_DIGITS = 1e-5
Fingerprint = Mapping[str, Mapping[str, Any]]


def fingerprint(tuner: Tuner, scanned: Scan | None = None) -> dict[str, dict[str, Any]]:
    """``{parameter: {"shape": [...], "dtype": "float32", "sample": [...]}}`` of the base under ``tuner``.

    A tensor on the meta device has no values, so its sample is empty, and only its shape is compared.

    What the adapter trains in full (copies, biases) is left out: a fresh head has other values at each load. Before
    the adapter is in the model, ``scanned`` says how its biases are named.
    """
    places = base_tensors(tuner, scanned)
    samples = _sample(list(places.values()))
    return {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."), "sample": values}
        for (name, tensor), values in zip(places.items(), samples, strict=True)
    }


def differences(saved: Fingerprint, found: Fingerprint) -> list[str]:
    """What differs between two fingerprints, one line per kind of difference; empty if they agree."""
    lines = []
    missing = [name for name in saved if name not in found]
    unexpected = [name for name in found if name not in saved]
    shared = [name for name in saved if name in found]
    misfits = [name for name in shared if saved[name]["shape"] != found[name]["shape"]]
    shapes = [f"{name} {saved[name]['shape']} -> {found[name]['shape']}" for name in misfits]
    alike = [name for name in shared if name not in misfits]
    values = [name for name in alike if not _close(saved[name], found[name])]
    for what, names in (
        ("parameters that this base lacks", missing),
        ("parameters that only this base has", unexpected),
        ("other shapes (saved -> here)", shapes),
        ("other values", values),
    ):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            lines.append(f"{what}: {', '.join(names[:_SHOWN])}{more}")
    return lines


def base_tensors(tuner: Tuner, scanned: Scan | None) -> dict[str, Tensor]:
    """The base's own parameters by name, originals where merged ones stand now, without what the adapter trains."""
    copied = frozenset(place.path for place in tuner.copies)
    biased = {join(place.path, bias_name(_base_of(place, scanned))) for place in tuner.biases}
    found = {}
    for path, module in base_modules(tuner.model):
        if is_under(path, copied):
            continue
        for leaf, parameter in torch_private.own_parameters(module).items():
            name = f"{path}.{leaf}" if path else leaf
            if parameter is not None and name not in biased:
                found[name] = _original(module, leaf, parameter)
    return found


def _base_of(place: Target, scanned: Scan | None) -> BaseLayer | None:
    """What the module was when it was adapted, or is if it was not yet."""
    slots = slots_of(place.module)
    if slots is not None:
        return slots.base
    return scanned.by_path[place.path].base if scanned is not None else None


def _original(module: nn.Module, leaf: str, parameter: nn.Parameter) -> Tensor:
    slots = slots_of(module)
    return parameter.detach() if slots is None else slots.original(leaf, parameter)


def _sample(tensors: list[Tensor]) -> list[list[float]]:
    """`SAMPLES` evenly spaced values of each tensor that has any; one transfer per device and dtype for all.

    ``take`` counts positions through whatever strides a tensor has, so nothing is copied.
    """
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for number, tensor in enumerate(tensors):
        if tensor.numel() and not tensor.is_meta:
            alike[tensor.device, tensor.dtype].append(number)
    values: list[list[float]] = [[] for _ in tensors]
    for (device, _), numbers in alike.items():
        last = [tensors[number].numel() - 1 for number in numbers]
        places = torch.tensor([[i * end // (SAMPLES - 1) for i in range(SAMPLES)] for end in last], device=device)
        taken = [_take(tensors[number], row) for number, row in zip(numbers, places.unbind(), strict=True)]
        for number, found in zip(numbers, torch.stack(taken).float().tolist(), strict=True):
            values[number] = [_short(value) for value in found]
    return values


def _take(tensor: Tensor, places: Tensor) -> Tensor:
    """Values at flat positions; those of 8-bit floats by their bytes, which `torch.take` knows."""
    if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1:
        return torch.take(tensor.view(torch.uint8), places).view(tensor.dtype)
    return torch.take(tensor, places)


def _short(value: float) -> float:
    # JSON has no NaN or inf; a base that holds one still gets a fingerprint.
    return float(f"{value:.6g}") if math.isfinite(value) else 0.0


def _close(saved: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether two samples are of one tensor: to the digits kept in one dtype, to bfloat16's across dtypes."""
    if not saved["sample"] or not found["sample"]:
        return True
    relative = _DIGITS if saved["dtype"] == found["dtype"] else _RELATIVE
    return len(saved["sample"]) == len(found["sample"]) and all(
        math.isclose(a, b, rel_tol=relative, abs_tol=1e-7)
        for a, b in zip(saved["sample"], found["sample"], strict=True)
    )
