"""Finds adapters that never run, because the owner of their base layer uses its weight directly."""

import functools
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from tunerkit import hooks
from tunerkit.errors import TunerkitWarning
from tunerkit.injection.integrity import refuse_lost
from tunerkit.injection.tuner import tuners_of
from tunerkit.libraries import forward_name, torch_private
from tunerkit.paths import parent

_ATTRIBUTE = "_tunerkit_calls"
_LISTS = (nn.ModuleList, nn.ModuleDict)


class Calls(NamedTuple):
    """What ran in eager mode before the report.

    Attributes:
        owner_ran: The paths of the adapted modules whose owner ran.
        called: The paths of the adapted modules that ran themselves.
        owners: The owner by the path of the container. The model may be changed before the report.
        lists: The paths of the containers that never run.
    """

    owner_ran: set[str]
    called: set[str]
    owners: dict[str, nn.Module]
    lists: set[str]


def watch(model: nn.Module, adapted: Mapping[str, nn.Module]) -> None:
    """Watch ``model`` run, to warn about adapted modules that did not run although their owner did.

    The warning comes after the next eager forward of the whole model. It comes at an optimizer step if that is
    earlier: a custom loop may call only parts of the model.

    A layer that a branch or LayerDrop skips triggers no warning if its owner is skipped too. Nor does one in a list or
    dict of modules of which another ran: its owner chose among them.
    """
    _unwatch(model)
    if not adapted:
        return
    owners = {above: _running(model, above) for above in {parent(path) for path in adapted}}
    lists = {above for above in owners if isinstance(model.get_submodule(above), _LISTS)}
    calls = vars(model)[_ATTRIBUTE] = Calls(set(), set(), owners, lists)  # first, so that `_unwatch` undoes a half
    for path, module in adapted.items():
        module.register_forward_pre_hook(functools.partial(note_call, calls.called, path))
        owners[parent(path)].register_forward_pre_hook(functools.partial(note_call, calls.owner_ran, path))
    model.register_forward_hook(report)


def _unwatch(model: nn.Module) -> None:
    if _ATTRIBUTE in vars(model):
        for module in model.modules():
            torch_private.remove_hooks_(module, note_call, report)
        vars(model).pop(_ATTRIBUTE, None)  # another thread may have been faster


def _running(model: nn.Module, path: str) -> nn.Module:
    """Return the module at ``path``, or the closest one above that has a forward: a ModuleList never runs."""
    found = model.get_submodule(path)
    return _running(model, parent(path)) if path and isinstance(found, _LISTS) else found


def _known(calls: Calls, silent: Iterable[str]) -> str:
    """How to get a plugin that may know the owners, as the end of a sentence."""
    found = (hooks.unserved(calls.owners[parent(path)]) for path in silent)
    return next((f". {each}" for each in found if each), "")


def note_call(seen: set[str], path: str, module: nn.Module, args: Any) -> None:
    """Add ``path`` to ``seen``: with these two bound, the forward pre-hook of watched modules and their owners."""
    # Not under compile: compiled code must not have a Python side effect in each call.
    if not torch.compiler.is_compiling():
        seen.add(path)


def report(model: nn.Module, *call: Any) -> None:
    """Warn about what was seen of ``model``, once: its forward hook, which may also be called without a forward.

    If nothing has run in eager mode yet, the watch continues.

    Raises:
        AdapterError: The base was quantised, or otherwise replaced, after it had been wrapped. A loop that attaches
            nothing would train without these adapters.
    """
    calls: Calls | None = vars(model).get(_ATTRIBUTE)
    if calls is None or not calls.owner_ran or torch.compiler.is_compiling():
        return
    refuse_lost(tuners_of(model).values())
    _unwatch(model)
    chosen_among = calls.lists.intersection(map(parent, calls.called))
    silent = sorted(path for path in calls.owner_ran - calls.called if parent(path) not in chosen_among)
    if silent:
        owners = sorted({forward_name(calls.owners[parent(path)]) for path in silent})
        warnings.warn(
            f"these adapters never ran although the module that owns their base layer did: {', '.join(silent)}. "
            "Unless this forward did not need them, the owner uses the weight directly, bypassing the layer's "
            "forward(), and the adapter has no effect there. Leave these layers out (exclude=...), or install a plugin "
            f"that names the owner ({', '.join(owners)}) and these children through tunerkit_weight_readers"
            f"{_known(calls, silent)}",
            TunerkitWarning,
            stacklevel=3,
        )
