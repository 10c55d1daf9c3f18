"""Finds adapters that are never called, because their base layer's owner reads the weight past ``forward``."""

import functools
import warnings
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import nn

from tunerkit.errors import TunerkitWarning
from tunerkit.libraries import forward_name, torch_private
from tunerkit.paths import parent

_ATTRIBUTE = "_tunerkit_calls"


@attrs.define(eq=False)
class Calls:
    """What ran before the first report, in eager mode, by the adapted modules' paths."""

    owner_ran: set[str] = attrs.field(factory=set)
    called: set[str] = attrs.field(factory=set)


def watch(model: nn.Module, adapted: Mapping[str, nn.Module]) -> None:
    """Watch ``model`` run and warn about adapted modules that did not run, but their owner did.

    That is told after the next eager forward of the whole, or at a step of the optimizer if that comes first: a custom
    loop may call parts of the model only.

    A layer that a branch or LayerDrop leaves out is no false alarm if its owner is left out with it, or if it is one
    of a list or dict of modules and another of them ran: its owner chose among them.
    """
    unwatch(model)
    calls = Calls()
    owners = {above: _running(model, above) for above in {parent(path) for path in adapted}}
    for path, module in adapted.items():
        module.register_forward_pre_hook(functools.partial(note_call, calls.called, path))
        owners[parent(path)].register_forward_pre_hook(functools.partial(note_call, calls.owner_ran, path))
    model.register_forward_hook(_report)
    vars(model)[_ATTRIBUTE] = calls


def unwatch(model: nn.Module) -> None:
    """Stop watching: after the first forward, or when the adapters leave the model."""
    if vars(model).pop(_ATTRIBUTE, None) is not None:
        for module in model.modules():
            torch_private.remove_hooks_(module, note_call, _report)


def _running(model: nn.Module, path: str) -> nn.Module:
    """The module at ``path``, or the closest above that has a forward of its own: a ModuleList never runs."""
    found = model.get_submodule(path)
    return _running(model, parent(path)) if path and isinstance(found, nn.ModuleList | nn.ModuleDict) else found


def note_call(seen: set[str], path: str, module: nn.Module, args: Any) -> None:
    """The forward pre-hook of watched modules and their owners, once it is given where to note the call."""
    # Under compile the watch is off: a Python side effect per call is what compiled code must not have.
    if not torch.compiler.is_compiling():
        seen.add(path)


def report(model: nn.Module) -> None:
    """Tell what has been seen of ``model``, once; while nothing has run in eager mode the watch goes on."""
    calls: Calls | None = vars(model).get(_ATTRIBUTE)
    if calls is None or not calls.owner_ran or torch.compiler.is_compiling():
        return
    unwatch(model)
    holders = {path: model.get_submodule(path) for path in map(parent, calls.called)}
    chosen_among = {path for path, holder in holders.items() if isinstance(holder, nn.ModuleList | nn.ModuleDict)}
    silent = sorted(path for path in calls.owner_ran - calls.called if parent(path) not in chosen_among)
    if silent:
        owners = sorted({forward_name(_running(model, parent(path))) for path in silent})
        warnings.warn(
            f"these adapters never ran although the module that owns their base layer did: {', '.join(silent)}. "
            "Unless this forward had no use for them, the owner uses the weight without calling the layer, and the "
            "adapter has no effect there: leave these layers out (exclude=...), or install a plugin that names the "
            f"owner ({', '.join(owners)}) and these children through tunerkit_weight_readers",
            TunerkitWarning,
            stacklevel=3,
        )


def _report(model: nn.Module, args: Any, output: Any) -> None:
    report(model)
