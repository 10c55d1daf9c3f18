"""Finds adapters that are never called, because their base layer's owner reads the weight past ``forward``."""

import functools
import warnings
from typing import Any

import attrs
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from tunerkit.errors import TunerkitWarning
from tunerkit.records import Target

_ATTRIBUTE = "_tunerkit_calls"


@attrs.define(eq=False)
class Calls:
    """What ran during the first eager forward of the whole model, by target path."""

    owner_ran: set[str] = attrs.field(factory=set)
    called: set[str] = attrs.field(factory=set)
    handles: list[RemovableHandle] = attrs.field(factory=list)


def watch(model: nn.Module, targets: tuple[Target, ...]) -> None:
    """Watch the next eager forward of ``model`` and warn about targets whose parent ran while they did not.

    A layer that a branch or LayerDrop leaves out is no false alarm as long as its parent is left out with it.
    """
    unwatch(model)
    calls = Calls()
    for target in targets:
        owner = _owner(model, target.path)
        calls.handles.append(target.module.register_forward_pre_hook(functools.partial(_note, calls.called, target.path)))
        calls.handles.append(owner.register_forward_pre_hook(functools.partial(_note, calls.owner_ran, target.path)))
    calls.handles.append(model.register_forward_hook(functools.partial(_report, calls)))
    vars(model)[_ATTRIBUTE] = calls


def unwatch(model: nn.Module) -> None:
    """Stop watching: after the first forward, or when the adapters leave the model."""
    calls: Calls | None = vars(model).pop(_ATTRIBUTE, None)
    for handle in calls.handles if calls is not None else ():
        handle.remove()


def _owner(model: nn.Module, path: str) -> nn.Module:
    """The closest module above ``path`` that has a forward of its own (a ModuleList never runs)."""
    parts = path.split(".")
    for end in range(len(parts) - 1, -1, -1):
        owner = model.get_submodule(".".join(parts[:end]))
        if not isinstance(owner, nn.ModuleList | nn.ModuleDict):
            return owner
    return model


def _note(seen: set[str], path: str, module: nn.Module, args: Any) -> None:
    # Under compile the watch is off: a Python side effect per call is what compiled code must not have.
    if not torch.compiler.is_compiling():
        seen.add(path)


def _report(calls: Calls, model: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    unwatch(model)
    silent = sorted(calls.owner_ran - calls.called)
    if silent:
        warnings.warn(
            f"these adapters never ran although the module that owns their base layer did: {', '.join(silent)}. "
            "The owner reads the weight without calling the layer, so the adapter has no effect there; "
            "leave these layers out (exclude=...) or install a plugin with a base-layer kind for their owner",
            TunerkitWarning,
            stacklevel=2,
        )
