"""The layers of a base whose weight a quantiser stores: found in a model, described in files, compared."""

from collections.abc import Iterable, Mapping
from typing import Any

from tunerkit import hooks, injection
from tunerkit.injection import Tuner
from tunerkit.layers import CORE, BaseLayer, Knowledge, as_base_layers
from tunerkit.libraries import is_dtype_name
from tunerkit.paths import join
from tunerkit.targets import Scan

Entry = Mapping[str, Any]


def packed_layers(tuner: Tuner, scanned: Scan | None) -> dict[str, BaseLayer]:
    """Return the modules of the base with a `BaseLayer.packing`, by path, each as its kind sees it.

    Args:
        tuner: The adapter's handle.
        scanned: The scan of the model, if there is one from before the adapter was put in.
    """
    if scanned is not None:
        every = {found.path: found.base for found in (scanned.root, *scanned.modules)}
    else:
        every = _seen_again(tuner)
    return {path: base for path, base in every.items() if base is not None and base.packing is not None}


def _seen_again(tuner: Tuner) -> dict[str, BaseLayer | None]:
    """Each module as it was when it was adapted; those without an adapter as a plugin's kind sees them now."""
    places = list(injection.base_modules(tuner.model))
    slots = {path: injection.slots_of(module) for path, module in places}
    knowledge = hooks.gather_knowledge()
    kinds = tuple(kind for kind in knowledge.kinds if kind not in CORE.kinds)  # core's own have no packing
    others = {path: module for path, module in places if (found := slots[path]) is None or found.base is None}
    known = Knowledge(kinds, (), (), knowledge.leave_out)
    bases = as_base_layers(others.values(), known) if kinds else {}
    return {
        path: bases.get(module) if (found := slots[path]) is None or found.base is None else found.base
        for path, module in places
    }


def entry_of(base: BaseLayer) -> dict[str, Any]:
    """Describe the weight of a packed layer in a fingerprint: (out, in), and the quantiser's name as its dtype."""
    assert base.packing is not None
    return {"shape": [base.out_features, base.in_features], "dtype": base.packing.name, "sample": []}


def weight_entry(path: str) -> str:
    """The name of a packed layer's weight in a fingerprint: that of the unquantised layer."""
    return join(path, "weight")


def is_packed_entry(entry: Entry) -> bool:
    """Whether an entry of a fingerprint describes a packed weight: its dtype is none of torch's."""
    return not is_dtype_name(str(entry["dtype"]))


def stored_otherwise(pairs: Iterable[tuple[Entry, Entry]]) -> dict[tuple[str, str], int]:
    """Count the pairs of entries of which one is packed and the other is stored in another way.

    Returns:
        The counts by the two dtypes.
    """
    counts: dict[tuple[str, str], int] = {}
    for saved, found in pairs:
        key = (str(saved["dtype"]), str(found["dtype"]))
        if key[0] != key[1] and (is_packed_entry(saved) or is_packed_entry(found)):
            counts[key] = counts.get(key, 0) + 1
    return counts
