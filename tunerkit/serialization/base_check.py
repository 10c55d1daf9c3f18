"""Whether a model is the base that an adapter was trained on: its parameters, its settings, and what is trained.

A file also names the new modules that another adapter trained in full beside this one, on whose copies it was trained.
Its fingerprint leaves their values out, which are random in each process, and the model needs the other adapter.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from tunerkit import hooks, targets
from tunerkit.errors import BaseMismatchError, FileError, TargetError, cut, shown, warn
from tunerkit.extras import SETTINGS, distribution, install
from tunerkit.hooks import is_grouped
from tunerkit.injection import Tuner, base_modules, modules_in, slots_of
from tunerkit.layers import torch_private
from tunerkit.paths import few, join
from tunerkit.records import Target
from tunerkit.serialization.fingerprint import (
    OTHER_VALUES,
    Fingerprint,
    differences,
    fingerprint,
    reshaped,
    trained_biases,
)
from tunerkit.serialization.header import Header
from tunerkit.serialization.packed import stored_otherwise
from tunerkit.serialization.tensor_checks import resize_hint
from tunerkit.targets import Scan

# The entries of an adapter file's ``values`` with the base's settings, and with the paths of what was trained beside
# it. Readers that do not know them ignore them.
_SETTINGS, _BESIDE = "base_config", "trained_beside"


def describe_base(tuner: Tuner) -> dict[str, Any]:
    """Return the header's fields ``base`` and ``values`` for an adapter's file."""
    kept = tuner.progress.fingerprint  # from before a permanent merge
    values: dict[str, Any] = {_SETTINGS: _settings_of(tuner.model) or tuner.progress.settings}
    if tuner.progress.beside:
        values[_BESIDE] = list(tuner.progress.beside)
    return {"base": kept or fingerprint(tuner), "values": values}


def refuse_places(
    scanned: Scan, chosen: Sequence[Target], copies: Sequence[str], source: str, *, outputs: bool = False
) -> None:
    """Raise `TargetError` if this model cannot take an adapter of the file at its targets, or its copies."""
    try:
        targets.refuse_unfit(scanned, chosen, outputs=outputs)
        targets.refuse_tied(scanned, copies)
    except TargetError as error:
        raise TargetError(f"{source} cannot be loaded onto this model: {error}") from error


def beside_of(header: Header, source: str) -> tuple[str, ...]:
    """Return the paths in a file's header of what was trained beside it. Raises `FileError` for anything else there."""
    match header.values.get(_BESIDE, []):
        case list(paths) if all(isinstance(path, str) for path in paths):
            return tuple(paths)
    raise _unwritten(header, _BESIDE, source)


def _unwritten(header: Header, entry: str, source: str) -> FileError:
    found = shown(header.values[entry])
    return FileError(f"{source}: its header has a field that tunerkit would not write: {entry} {found}")


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
    modules = modules_in(tuner)
    biases = trained_biases(tuner, scanned).items()
    lacking = [path for path, name in biases if torch_private.own_parameters(modules[path]).get(name) is None]
    if lacking:
        lines.append(f"modules without the bias that the adapter trains: {few(lacking, shown=5)}")
    other = _other_settings(tuner, header, source) if check_config else []
    if other:
        lines.append(f"other settings in its config (saved -> here): {few(other, shown=5)}")
    if lines:
        shapes: list[Any] = [
            (header.base[name]["shape"], found[name]["shape"]) for name in reshaped(header.base, found)
        ]
        hint = resize_hint(tuner.model, shapes)
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
        warn(
            f"{source} was trained on a base whose weights are stored in another way (saved -> here: {listed}). Their "
            "values cannot be compared, and outputs differ by what quantising changes"
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


def _settings_of(model: nn.Module) -> dict[str, Any]:
    """The settings that change a model's output but not its weights, by name, as libraries know them."""
    found = (library.settings(model) for library in hooks.gather_libraries())
    return {name: value for settings in found for name, value in settings.items()}


def _other_settings(tuner: Tuner, header: Header, source: str) -> list[str]:
    """List the settings that two bases have with different values; one that only one of them has is no difference."""
    saved = header.values.get(_SETTINGS, {})
    if not isinstance(saved, dict):
        raise _unwritten(header, _SETTINGS, source)
    found = _settings_of(tuner.model)
    tuner.progress.settings.update(saved)
    if found and not saved and _SETTINGS in header.values:
        warn(
            f"{source} was saved where no plugin knew the settings of its base, such as {few(list(found), shown=3)}: "
            "they cannot be compared with this model's"
        )
    if saved and not found and (absent := hooks.registry.absence(distribution(SETTINGS))):
        warn(
            f"{source} records settings of its base that change the output, and they are not compared: "
            f"{few(list(saved), shown=5)}. {distribution(SETTINGS)} compares them, and {absent} ({install(SETTINGS)}). "
            "To load without comparing them, pass check_config=False"
        )
    return [
        f"{cut(name, 200)} {shown(value)} -> {shown(found[name])}"
        for name, value in sorted(saved.items())
        if name in found and found[name] != value
    ]


def warn_of_lone(tuner: Tuner) -> None:
    """Warn if no active adapter trains a module that another one trained when the adapter was made."""
    modules = dict(base_modules(tuner.model))
    slots = {path: slots_of(modules[path]) for path in tuner.progress.beside}
    lone = [path for path, own in slots.items() if own is None or own.copies.keys().isdisjoint(own.active)]
    if lone:
        warn(
            f"adapter {tuner.name!r} was trained beside another adapter that trains {few(lone, shown=5)} in full, and "
            "no active adapter does so here: the model uses the base's own values, which are random in a new head. "
            "Load that adapter too, before this one"
        )
