"""Refuse an adapter name or a model that cannot take an adapter, before anything is built."""

import gc
from collections.abc import Collection

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from tunerkit import inject
from tunerkit.errors import AdapterError
from tunerkit.merge import refuse_disabled, refuse_merged
from tunerkit.slots import CHILD, slots_of, walk
from tunerkit.tuner import tuners_of

_NAME_LIMIT = 64


def check_name(adapter: object) -> None:
    """Adapter names become a part of parameter names, hence the limits."""
    if not isinstance(adapter, str) or not 1 <= len(adapter) <= _NAME_LIMIT or "." in adapter or "/" in adapter:
        raise AdapterError(
            f"adapter name {adapter!r}: expected 1 to {_NAME_LIMIT} characters without '.' and '/', choose another"
        )
    if any("\ud800" <= character <= "\udfff" for character in adapter):
        raise AdapterError(
            f"adapter name {adapter!r} holds half of a surrogate pair, and so would the names of its parameters: no "
            "file can hold them; choose another"
        )


def refuse_taken(names: Collection[str], adapter: str) -> None:
    """Refuse a name that another adapter of the model has."""
    if adapter in names:
        raise AdapterError(f"the model has an adapter named {adapter!r} already; choose another, or delete that one")


def refuse_unready(model: nn.Module, adapter: str) -> None:
    """Refuse a model that cannot take another adapter now."""
    lazy = [name for name, p in model.named_parameters() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise AdapterError(f"the model has parameters without a shape yet ({lazy[0]}, ...); run one batch first")
    if _is_inside_ddp(model):
        raise AdapterError("the model is already inside DistributedDataParallel; wrap it first, then put it into DDP")
    tuners = tuners_of(model)
    root = next((other.model for other in tuners.values()), None)
    if root is not model and (tuners or next(walk(model), None) is not None):
        whole = f"the {type(root).__name__} inside it" if root is not None else "the model that it is a part of"
        raise AdapterError(f"{whole} has adapters already; wrap that one, so that one model holds them all")
    foreign = [path for path, module in model.named_modules() if hasattr(module, CHILD) and slots_of(module) is None]
    foreign = [path for path in foreign if not inject.is_adapter_path(path + ".")]
    if foreign:
        raise AdapterError(
            f"the model has an attribute {CHILD!r} of its own at {foreign[0]!r}; adapters go there: rename it"
        )
    refuse_disabled(model)
    refuse_taken(tuners, adapter)
    refuse_merged(model, "adding an adapter")


def _is_inside_ddp(model: nn.Module) -> bool:
    """Whether DistributedDataParallel holds the model or a part of it: it would not synchronise what is added now."""
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        return True
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    if not _is_held_by_ddp(model):
        return False
    gc.collect()  # one that was given up may lie in a cycle
    return _is_held_by_ddp(model)


def _is_held_by_ddp(model: nn.Module) -> bool:
    """Whether a live DDP shares a module with ``model``: modules do not know what holds them."""
    modules = set(model.modules())
    # By type: asking isinstance of any object may run code of its own.
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), nn.parallel.DistributedDataParallel)]
    return any(not modules.isdisjoint(parallel.modules()) for parallel in found)
