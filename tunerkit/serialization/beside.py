"""The new modules that another adapter trained in full beside an adapter: its file names them, and `load` looks there.

The adapter was trained on the other one's copies. So its fingerprint leaves the base's own values out, which are random
in each process, and the model needs the other adapter.
"""

import warnings
from typing import Any

from tunerkit import injection
from tunerkit.errors import FileError, TunerkitWarning, shown
from tunerkit.injection import Tuner
from tunerkit.paths import few
from tunerkit.serialization.header import Header

# The entry of an adapter file's ``values`` with the modules' paths. Readers that do not know it ignore it.
_ENTRY = "trained_beside"


def describe_beside(tuner: Tuner) -> dict[str, Any]:
    """Return the entry for the header's field ``values``; nothing if there is no such module."""
    return {_ENTRY: list(tuner.progress.beside)} if tuner.progress.beside else {}


def beside_of(header: Header, source: str) -> tuple[str, ...]:
    """Return the paths in a file's header. Raises `FileError` for anything else there."""
    match header.values.get(_ENTRY, []):
        case list(paths) if all(isinstance(path, str) for path in paths):
            return tuple(paths)
    raise FileError(
        f"{source}: its header has a field that tunerkit would not write: {_ENTRY} {shown(header.values[_ENTRY])}"
    )


def warn_of_lone(tuner: Tuner) -> None:
    """Warn if no active adapter trains a module that another one trained when the adapter was made."""
    modules = dict(injection.base_modules(tuner.model))
    slots = {path: injection.slots_of(modules[path]) for path in tuner.progress.beside}
    lone = [path for path, own in slots.items() if own is None or own.copies.keys().isdisjoint(own.active)]
    if lone:
        warnings.warn(
            f"adapter {tuner.name!r} was trained beside another adapter that trains {few(lone, shown=5)} in full, and "
            "no active adapter does so here: the model uses the base's own values, which are random in a new head. "
            "Load that adapter too, before this one",
            TunerkitWarning,
            stacklevel=4,
        )
