"""Warns of an optimizer that steps an adapter without driving it, which would be silent for a whole training.

One hook serves all optimizers of the process. It looks once at the parameters of each optimizer, and from then on only
at the adapters that it found among them.
"""

import warnings
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import attrs
import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from tunerkit import hooks
from tunerkit.errors import AdapterError, TunerkitWarning
from tunerkit.injection import Tuner, unseen
from tunerkit.steps.links import is_attached, optimizer_of


@attrs.define(eq=False)
class _Look:
    """The adapters that an optimizer held when it had so many groups and so many adapters had been seen."""

    groups: int
    seen: int
    held: WeakSet[Tuner]
    warned: WeakSet[Tuner] = attrs.field(factory=WeakSet)


@attrs.define(eq=False)
class _Watch:
    """Whether the hook is registered, how many adapters it has seen and which are left, and the last looks."""

    registered: bool = False
    seen: int = 0
    tuners: WeakSet[Tuner] = attrs.field(factory=WeakSet)
    looks: WeakKeyDictionary[Optimizer, _Look] = attrs.field(factory=WeakKeyDictionary)


# State of the process, as torch's hook is: no model knows the optimizers that somebody builds for it.
_watch = _Watch()


def watch_optimizers(method: str) -> None:
    """Watch all optimizers from now on, if ``method`` acts on their steps; registered once for the process."""
    if not _watch.registered and hooks.watches_steps(method):
        _watch.registered = True
        register_optimizer_step_post_hook(warn_of_undriven_steps)


def warn_of_undriven_steps(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Warn, once, of each adapter that ``optimizer`` has just moved although something else, or nothing, drives it."""
    if torch.compiler.is_compiling():
        return  # somebody's compiled step must not be traced through weak references
    _note_new()
    look = _watch.looks.get(optimizer)
    if look is None or (look.groups, look.seen) != (len(optimizer.param_groups), _watch.seen):
        warned = WeakSet[Tuner]() if look is None else look.warned
        look = _Look(len(optimizer.param_groups), _watch.seen, _held_by(optimizer), warned)
        _watch.looks[optimizer] = look
    for tuner in [tuner for tuner in look.held if tuner not in look.warned]:
        driven = is_attached(tuner) and optimizer_of(tuner) is optimizer
        if not driven and any(p.requires_grad and p.grad is not None for p in _parameters(tuner)):
            look.warned.add(tuner)
            _warn(tuner, optimizer)


def _note_new() -> None:
    """Take in new tuners. Not when they are made: a copy has no parameters yet then."""
    for tuner in list(unseen):
        unseen.discard(tuner)
        if hooks.watches_steps(tuner.method):
            _watch.seen += 1
            _watch.tuners.add(tuner)


def _held_by(optimizer: Optimizer) -> WeakSet[Tuner]:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return WeakSet(tuner for tuner in _watch.tuners if not held.isdisjoint(map(id, _parameters(tuner))))


def _parameters(tuner: Tuner) -> list[torch.nn.Parameter]:
    """Its parameters; none if the adapter is in no model, or somebody tore it out."""
    try:
        return list(tuner.parameters())
    except AdapterError:
        return []


def _warn(tuner: Tuner, optimizer: Optimizer) -> None:
    driver = "another optimizer drives it" if is_attached(tuner) else "nothing drives it"
    warnings.warn(
        f"an optimizer ({type(optimizer).__name__}) steps adapter {tuner.name!r}, but {driver}: method "
        f"{tuner.method!r} does not see these steps. Call tunerkit.attach with this optimizer; one that was "
        "deep-copied lost its hooks, and a deep-copied model is attached by itself",
        TunerkitWarning,
        stacklevel=4,
    )
