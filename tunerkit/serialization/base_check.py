"""Whether a model is the base that an adapter was trained on: its parameters, its settings, and what is trained."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tunerkit.engine import is_grouped
from tunerkit.errors import BaseMismatchError, FileError, TunerkitWarning, shown
from tunerkit.injection import Tuner, base_modules, slots_of
from tunerkit.libraries import labels_hint, torch_private
from tunerkit.paths import few, join
from tunerkit.serialization.beside import describe_beside
from tunerkit.serialization.fingerprint import (
    OTHER_VALUES,
    Fingerprint,
    differences,
    fingerprint,
    reshaped,
    trained_biases,
)
from tunerkit.serialization.forward_config import forward_config, forward_differences
from tunerkit.serialization.header import Header
from tunerkit.serialization.packings import stored_otherwise
from tunerkit.targets import Scan

# The entry of an adapter file's ``values`` with the base's settings. Readers that do not know it ignore it.
_SETTINGS = "base_config"


def describe_base(tuner: Tuner) -> dict[str, Any]:
    """Return the header's fields ``base`` and ``values`` for an adapter's file."""
    kept = tuner.progress.fingerprint  # from before a permanent merge
    values = {_SETTINGS: forward_config(tuner.model)} | describe_beside(tuner)
    return {"base": kept or fingerprint(tuner), "values": values}


def note_base(tuner: Tuner, scanned: Scan) -> None:
    """Keep the base's fingerprint in a group of processes, also in one of a single process: it may shard the base."""
    if is_grouped():
        tuner.progress.noted = fingerprint(tuner, scanned)


def refuse_other_base(
    tuner: Tuner, header: Header, source: str, scanned: Scan | None = None, *, check_config: bool = True
) -> None:
    """Raise `BaseMismatchError` if the base under ``tuner`` is not the one that the file describes.

    Warn if it is, and one of the two is quantised, or both are in different ways.

    Args:
        tuner: The adapter's handle.
        header: The file's header.
        source: The file.
        scanned: The scan of the model; only needed before the adapter is in the model.
        check_config: Whether to compare the settings too. A file of an earlier version has none.
    """
    found = fingerprint(tuner, scanned)
    lines = differences(header.base, found)
    if lacking := _without_bias(tuner, scanned):
        lines.append(f"modules without the bias that the adapter trains: {few(lacking, shown=5)}")
    other = _other_settings(tuner, header, source) if check_config else []
    if other:
        lines.append(f"other settings in its config (saved -> here): {few(other, shown=5)}")
    if lines:
        hint = _hint(tuner, header.base, found)
        if any(line.startswith(OTHER_VALUES) for line in lines) and not hint:
            hint = (
                "; if a head or tokens were new when the adapter was trained, only that base has their values: save "
                "the base before you wrap it, and load adapters onto it"
            )
        if other and len(lines) == 1:
            hint = "; its weights are the same, so if you mean to use it, pass check_config=False to tunerkit.load"
        raise BaseMismatchError("\n- ".join([f"{source} was trained on another base model{hint}:", *lines]))
    _warn_of_storage(header.base, found, source)


def _warn_of_storage(saved: Fingerprint, found: Fingerprint, source: str) -> None:
    """Warn, in one line, if this base stores weights with another quantiser than the one of the file, or with none."""
    counts = stored_otherwise((entry, found[name]) for name, entry in saved.items() if name in found)
    if counts:
        listed = "; ".join(f"{count} layers: {before} -> {here}" for (before, here), count in counts.items())
        warnings.warn(
            f"{source} was trained on a base whose weights are stored in another way (saved -> here: {listed}). Their "
            "values cannot be compared, and outputs differ by what quantising changes",
            TunerkitWarning,
            stacklevel=4,
        )


def base_values(tuner: Tuner) -> dict[str, Tensor]:
    """Return the base's own values of the modules that are trained in full, by the names of their copies."""
    found = {}
    for place in tuner.copies:
        for path, module in base_modules(place.module):
            slots = slots_of(module)
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            for name, live in own:
                value = live.detach() if slots is None else slots.original(name, live)
                found[join(place.path, f"copy.{join(path, name)}")] = value
    return found


def _without_bias(tuner: Tuner, scanned: Scan | None) -> list[str]:
    modules = tuner.modules()
    names = trained_biases(tuner, scanned)
    return [path for path, name in names.items() if torch_private.own_parameters(modules[path]).get(name) is None]


def _other_settings(tuner: Tuner, header: Header, source: str) -> list[str]:
    saved = header.values.get(_SETTINGS, {})
    if not isinstance(saved, dict):
        raise FileError(f"{source}: its header has a field that tunerkit would not write: {_SETTINGS} {shown(saved)}")
    return forward_differences(saved, forward_config(tuner.model)) if saved else []


def _hint(tuner: Tuner, saved: Fingerprint, found: Mapping[str, Mapping[str, Any]]) -> str:
    return labels_hint(tuner.model, [(saved[name]["shape"], found[name]["shape"]) for name in reshaped(saved, found)])
