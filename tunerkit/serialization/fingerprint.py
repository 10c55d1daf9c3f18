"""Fingerprint an adapter's base model, and check that a model is the base on which an adapter was trained.

A fingerprint consists of names, shapes and sampled values, so its cost depends on the number of tensors. It excludes
modules trained in full, and new modules owned by another adapter that was active during training: their values are
random in each process.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tunerkit import hooks, layers, targets
from tunerkit.errors import AdapterError, BaseMismatchError, FileError, TargetError, cut, shown, warn
from tunerkit.injection import Tuner, base_modules, places_in, walk
from tunerkit.layers import BaseLayer, as_base_layers, is_packed, torch_private, weights, whole_shape
from tunerkit.paths import few, is_adapter_path, is_under, join
from tunerkit.records import Method, Target
from tunerkit.serialization.header import Header
from tunerkit.serialization.tensor_checks import resize_hint
from tunerkit.targets import Scan

SAMPLES = 4
# A base may be loaded in another precision than at training: bfloat16 has 8 bits of mantissa.
_RELATIVE = 2.0**-7
# Samples are stored with six digits.
_DIGITS = 1e-5
Fingerprint = Mapping[str, Mapping[str, Any]]
_OTHER_VALUES = "other values"
# Entries of the header's ``values``: the base's settings, and the paths of modules that another active adapter trained.
# Earlier versions ignore them.
_SETTINGS, _BESIDE = "base_config", "trained_beside"


def fingerprint(tuner: Tuner, scanned: Scan | None = None) -> dict[str, dict[str, Any]]:
    """Return ``{parameter: {"shape": [...], "dtype": "float32", "sample": [...]}}`` of the base model of ``tuner``.

    A tensor on the meta device has an empty sample. A quantized weight has one entry, with the name and shape of the
    unquantized weight and the quantizer's name as its dtype. Pass the model's scan as ``scanned`` before the adapter is
    injected: partitioned parameters are then gathered, so all processes must call this together. After the injection,
    the fingerprint of a sharded base is the one that `note_base` stored.
    """
    noted = tuner.progress.noted
    own = (parameter for name, parameter in tuner.model.named_parameters() if not is_adapter_path(name))
    if (noted or scanned is None) and weights.sharding(own) is not None:
        if noted is None:
            raise AdapterError(
                f"the base model of adapter {tuner.name!r} is sharded, and no fingerprint was taken before: call "
                "torch.distributed.init_process_group before tunerkit.wrap, or start the processes with torchrun"
            )
        return noted
    bases = _bases(tuner, scanned)
    tensors, packed = _base_weights(tuner, bases)
    emptied = {name: t for name, t in tensors.items() if not t.numel() and weights.emptied([t]) is not None}
    samples = _sample({name: tensor for name, tensor in tensors.items() if name not in emptied})
    for name, tensor in emptied.items():
        with weights.gathered(whole := nn.ParameterList([tensor])):
            samples |= _sample({name: whole[0].detach()})
    found: dict[str, dict[str, Any]] = {
        name: {"shape": list(whole_shape(t)), "dtype": str(t.dtype).removeprefix("torch."), "sample": samples[name]}
        for name, t in tensors.items()
    }
    return found | packed


def note_base(tuner: Tuner, scanned: Scan) -> None:
    """Compute and store the base's fingerprint; call it before the base is sharded."""
    tuner.progress.noted = fingerprint(tuner, scanned)


def packed_layers(tuner: Tuner) -> dict[str, BaseLayer]:
    """Return the base layers with packed weights (`BaseLayer.packing`), by module path."""
    bases = _bases(tuner)
    found = {path: bases[module] for path, module in base_modules(tuner.model) if module in bases}
    return {path: base for path, base in found.items() if base.packing is not None}


def _bases(tuner: Tuner, scanned: Scan | None = None) -> dict[nn.Module, BaseLayer]:
    """Return a model's base layers by module: from the scan, if it is given; else from the slots, or newly built."""
    if scanned is not None:
        return {found.module: found.base for found in scanned.by_path.values() if found.base is not None}
    places = places_in(tuner.model)
    adapted = {each: slots.base for _, each, slots in places if slots is not None and slots.base is not None}
    return adapted | as_base_layers([each for _, each, _ in places if each not in adapted], hooks.gather_knowledge())


def _base_weights(
    tuner: Tuner, bases: Mapping[nn.Module, BaseLayer]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Return the base's original tensors by name, and the fingerprint entries of its packed weights by name.

    Modules and biases trained in full are left out. If a target's weight is a buffer, all buffers of its module are
    included.
    """
    left_out = {*(place.path for place in tuner.copies), *tuner.progress.beside}
    targeted = {target.module for target in tuner.targets}
    biased = {join(place.path, layers.bias_name(bases.get(place.module))) for place in tuner.biases}
    found: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Any]] = {}
    places = places_in(tuner.model)
    adapted = [(slots.base, slots) for _, _, slots in places if slots is not None and slots.base is not None]
    held = {(own.holder, name): slots for own, slots in adapted for name in (own.weight_name, own.bias_name)}
    for path, module, slots in places:
        if is_under(path, left_out):
            continue
        base = bases.get(module)
        if base is not None and base.packing is not None:
            own = {base.bias_name: base.bias()}
            is_part = isinstance(module, nn.utils.parametrize.ParametrizationList)
            name = path.replace("parametrizations.", "") if is_part else join(path, "weight")
            packed[name] = {"shape": [*base.shape], "dtype": base.packing.name, "sample": []}
        else:
            own, buffers = dict(torch_private.own_parameters(module)), dict(module.named_buffers(recurse=False))
            if base is not None and module in targeted and base.weight_name in buffers:
                own |= buffers
        for leaf, tensor in own.items():
            name = join(path, leaf)
            if tensor is None or name in biased:
                continue
            if not tensor.numel() and weights.emptied([tensor]) is not None:  # `gathered` needs the Parameter object
                found[name] = tensor
            else:
                at = held.get((module, leaf), slots)
                found[name] = tensor.detach() if at is None else at.original(leaf, tensor)
    return found, packed


def _sample(tensors: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Return `SAMPLES` evenly spaced values of each tensor, with one transfer per device and dtype."""
    alike: dict[tuple[torch.device, torch.dtype], list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        if tensor.numel() and not tensor.is_meta and not is_packed(tensor):
            alike[tensor.device, tensor.dtype].append(name)
    samples: dict[str, list[float]] = {name: [] for name in tensors}
    for (device, dtype), names in alike.items():
        last = torch.tensor([tensors[name].numel() - 1 for name in names], device=device)
        places = last[:, None] * torch.arange(SAMPLES, device=device) // (SAMPLES - 1)  # (names, SAMPLES)
        # torch.take does not support 8-bit floats, so their bytes are read.
        stored = torch.uint8 if dtype.is_floating_point and dtype.itemsize == 1 else dtype
        rows = [torch.take(tensors[name].view(stored), row) for name, row in zip(names, places, strict=True)]
        for name, values in zip(names, torch.stack(rows).view(dtype).float().tolist(), strict=True):
            # JSON has no NaN or inf, but a base that contains them needs a fingerprint too.
            samples[name] = [float(f"{value:.6g}") if math.isfinite(value) else 0.0 for value in values]
    return samples


# --- Comparing --------------------------------------------------------------------------------------------------------


def differences(saved: Fingerprint, found: Fingerprint) -> list[str]:
    """List the differences between two fingerprints, one line per kind; empty if they agree."""
    resized = _reshaped(saved, found)
    pairs = {name: (entry, found[name]) for name, entry in saved.items() if name in found}
    kinds = {
        "parameters that this base lacks": [name for name in saved if name not in found],
        "parameters that only this base has": [name for name in found if name not in saved],
        "other shapes (saved -> here)": [f"{name} {there} -> {here}" for name, (there, here) in resized.items()],
        _OTHER_VALUES: [name for name, pair in pairs.items() if name not in resized and not _close(*pair)],
    }
    return [f"{what}: {few(names, shown=5)}" for what, names in kinds.items() if names]


def _reshaped(saved: Fingerprint, found: Fingerprint) -> dict[str, tuple[Any, Any]]:
    """Return (saved, found) shapes that differ, by name. A quantizer may store a Conv1D's (in, out) as (out, in)."""
    resized = {}
    for name, there in saved.items():
        here = found.get(name, there)
        turned = here["shape"][::-1] if _is_quantised(there) or _is_quantised(here) else here["shape"]
        if there["shape"] not in (here["shape"], turned):
            resized[name] = (there["shape"], here["shape"])
    return resized


def _is_quantised(entry: Mapping[str, Any]) -> bool:
    """Whether a fingerprint's entry describes a packed weight: its dtype is not one of torch's."""
    return not isinstance(vars(torch).get(str(entry["dtype"])), torch.dtype)


def _close(saved: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether two samples agree to the stored digits; if the dtypes differ, to bfloat16's precision."""
    if not saved["sample"] or not found["sample"] or saved["sample"] == found["sample"]:
        return True
    relative = _DIGITS if saved["dtype"] == found["dtype"] else _RELATIVE
    return len(saved["sample"]) == len(found["sample"]) and all(
        math.isclose(a, b, rel_tol=relative, abs_tol=1e-7)
        for a, b in zip(saved["sample"], found["sample"], strict=True)
    )


def refuse_other_base(
    tuner: Tuner, header: Header, source: str, scanned: Scan | None = None, *, check_config: bool = True
) -> None:
    """Raise `BaseMismatchError` if the base model of ``tuner`` differs from the base recorded in the file's header.

    Warn if the two bases are quantized differently. The base's settings are compared if the file records them.
    """
    found = fingerprint(tuner, scanned)
    lines = differences(header.base, found)
    has_other_values = any(line.startswith(_OTHER_VALUES) for line in lines)
    bases = _bases(tuner, scanned) if tuner.biases else {}
    biases = ((place, layers.bias_name(bases.get(place.module))) for place in tuner.biases)
    lacking = [place.path for place, name in biases if torch_private.own_parameters(place.module).get(name) is None]
    if lacking:
        lines.append(f"modules without the bias that the adapter trains: {few(lacking, shown=5)}")
    other = _other_settings(tuner, header, source) if check_config else []
    if other:
        lines.append(f"other settings in its config (saved -> here): {few(other, shown=5)}")
    if lines:
        hint = resize_hint(tuner.model, list(_reshaped(header.base, found).values()))
        if has_other_values and not hint:
            hint = (
                "; if a head or tokens were newly initialized for the training, only that base model has their values: "
                "save the base before you wrap it, and load adapters onto the saved base"
            )
        if other and len(lines) == 1:
            hint = "; the weights are the same, so to use this base anyway, pass check_config=False to tunerkit.load"
        raise BaseMismatchError("\n- ".join([f"{source} was trained on another base model{hint}:", *lines]))
    _warn_of_storage(header.base, found, source)


def _warn_of_storage(saved: Fingerprint, found: Fingerprint, source: str) -> None:
    """Warn once if this base and the base of the file were quantized differently, or only one of them was."""
    counts = Counter(
        (there["dtype"], found[name]["dtype"])
        for name, there in saved.items()
        if there["dtype"] != found[name]["dtype"] and (_is_quantised(there) or _is_quantised(found[name]))
    )
    if counts:
        listed = "; ".join(f"{count} layers: {before} -> {here}" for (before, here), count in counts.items())
        warn(
            f"{source} was trained on a base with another quantization (saved -> here: {listed}). Weights of these "
            "layers cannot be compared, and outputs differ by the quantization error"
        )


def base_values(tuner: Tuner) -> dict[str, Tensor]:
    """Return the base's values of modules whose copies are trained in full, by the copies' names in an adapter file."""
    found = {}
    for place in tuner.copies:
        for path, module, slots in places_in(place.module):
            for name, live in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                value = live.detach() if slots is None else slots.original(name, live)
                found[join(place.path, f"copy.{join(path, name)}")] = value
    return found


def refuse_places(
    scanned: Scan, chosen: Sequence[Target], copies: Sequence[str], source: str, *, method: Method
) -> None:
    """Raise `TargetError` if this model's modules cannot take the adapters and copies of the file ``source``."""
    try:
        targets.refuse_unfit(scanned, chosen, method=method)
        targets.refuse_tied(scanned, copies)
    except TargetError as error:
        raise TargetError(f"{source} cannot be loaded onto this model: {error}") from error


# --- Settings, and modules that another adapter trains ----------------------------------------------------------------


def described(tuner: Tuner) -> dict[str, Any]:
    """Return the base's settings and the modules that other adapters trained, for the header's ``values``."""
    values: dict[str, Any] = {_SETTINGS: _settings_of(tuner.model) or tuner.progress.settings}
    return values | ({_BESIDE: list(tuner.progress.beside)} if tuner.progress.beside else {})


def _settings_of(model: nn.Module) -> dict[str, Any]:
    """Return the settings that change the model's output but not its weights, by name, as plugins read them."""
    found = (library.settings(model) for library in hooks.libraries_of(model))
    return {name: value for settings in found for name, value in settings.items()}


def _other_settings(tuner: Tuner, header: Header, source: str) -> list[str]:
    """List the settings whose values differ between the saved base and this one."""
    saved = header.values.get(_SETTINGS, {})
    if not isinstance(saved, dict):
        raise _unwritten(header, _SETTINGS, source)
    found = _settings_of(tuner.model)
    tuner.progress.settings.update(saved)
    if found and not saved and _SETTINGS in header.values:
        warn(
            f"{source} records no settings of its base, such as {few(list(found), shown=3)}: no plugin read them when "
            "the file was saved. So they cannot be compared with this model's settings"
        )
    if saved and not found and (lacking := hooks.registry.lacking("compares them")):
        warn(
            f"{source} records settings of its base that change the output, but they cannot be compared here: "
            f"{few(list(saved), shown=5)}. {lacking}. To load without comparing them, pass check_config=False"
        )
    return [
        f"{cut(name, 200)} {shown(value)} -> {shown(found[name])}"
        for name, value in sorted(saved.items())
        if name in found and found[name] != value
    ]


def beside_of(header: Header, source: str) -> tuple[str, ...]:
    """Return the recorded paths of modules that another adapter trained. Raises `FileError` for an invalid header."""
    match header.values.get(_BESIDE, []):
        case list(paths) if all(isinstance(path, str) for path in paths):
            return tuple(paths)
    raise _unwritten(header, _BESIDE, source)


def _unwritten(header: Header, entry: str, source: str) -> FileError:
    found = shown(header.values[entry])
    return FileError(f"{source}: its header has an invalid field, which this release would not write: {entry} {found}")


def warn_of_lone(tuner: Tuner) -> None:
    """Warn of modules that another adapter trained together with this one, if no active adapter provides them here."""
    beside = tuner.progress.beside
    slots = {path: own for path, _, own in walk(tuner.model)} if beside else {}
    lone = [path for path in beside if path not in slots or slots[path].copies.keys().isdisjoint(slots[path].active)]
    if lone:
        warn(
            f"adapter {tuner.name!r} was trained together with another adapter, which trained {few(lone, shown=5)} in "
            "full. No active adapter provides these modules here, so the model uses the base's own values, which are "
            "random in a new head. Load the other adapter too, before this one"
        )
