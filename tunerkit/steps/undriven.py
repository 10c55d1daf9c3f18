"""Tell of an optimizer that steps an adapter without driving it: what would otherwise be silent for a whole training.

Importing this registers one hook for all optimizers of the process. It looks once at the parameters of each optimizer,
and from then on only at the adapters that were found among them.
"""

import warnings
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import attrs
import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from tunerkit import hooks
from tunerkit.errors import AdapterError, TunerkitWarning
from tunerkit.injection import Tuner, unseen
from tunerkit.steps.links import is_attached, optimizer_of


@attrs.define(eq=False)
class _Look:
    """The adapters that an optimizer was found to hold, when it had so many groups and so many adapters were known."""

    groups: int
    known: int
    held: WeakSet[Tuner]
    told: WeakSet[Tuner] = attrs.field(factory=WeakSet)


_owners = WeakIdKeyDictionary()  # from each parameter of an adapter to a reference to its tuner
_known = 0
_looks: WeakKeyDictionary[Optimizer, _Look] = WeakKeyDictionary()


def warn_of_undriven_steps(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Warn, once, of each adapter that ``optimizer`` has just moved although something else, or nothing, drives it."""
    if torch.compiler.is_compiling():
        return  # somebody's compiled step must not be traced through weak references
    _note_new()
    look = _looks.get(optimizer)
    if look is None or (look.groups, look.known) != (len(optimizer.param_groups), _known):
        told = WeakSet[Tuner]() if look is None else look.told
        look = _looks[optimizer] = _Look(len(optimizer.param_groups), _known, _held_by(optimizer), told)
    for tuner in [tuner for tuner in look.held if tuner not in look.told]:
        driven = is_attached(tuner) and optimizer_of(tuner) is optimizer
        if not driven and _was_moved(tuner):
            look.told.add(tuner)
            _tell(tuner, optimizer)


def _note_new() -> None:
    """Learn whose the parameters of new tuners are. Not when they are made: a copy has no parameters yet then."""
    global _known
    for tuner in list(unseen):
        unseen.discard(tuner)
        if hooks.watches_steps(tuner.method):
            _known += 1
            for parameter in _parameters(tuner):
                _owners[parameter] = ref(tuner)


def _held_by(optimizer: Optimizer) -> WeakSet[Tuner]:
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    found = (_owners[p]() for p in parameters if p in _owners)
    return WeakSet(tuner for tuner in found if tuner is not None)


def _was_moved(tuner: Tuner) -> bool:
    return any(p.requires_grad and p.grad is not None for p in _parameters(tuner))


def _parameters(tuner: Tuner) -> list[torch.nn.Parameter]:
    """Its parameters; none if the adapter is in no model, or somebody tore it out."""
    try:
        return list(tuner.parameters())
    except AdapterError:
        return []


def _tell(tuner: Tuner, optimizer: Optimizer) -> None:
    driver = "another optimizer drives it" if is_attached(tuner) else "nothing drives it"
    warnings.warn(
        f"an optimizer ({type(optimizer).__name__}) steps adapter {tuner.name!r}, but {driver}: method "
        f"{tuner.method!r} does not see these steps. Call tunerkit.attach with this optimizer; one that was "
        "deep-copied lost its hooks, and a deep-copied model is attached by itself",
        TunerkitWarning,
        stacklevel=4,
    )


register_optimizer_step_post_hook(warn_of_undriven_steps)
