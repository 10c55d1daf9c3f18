"""Warn if an optimizer steps an adapter that it does not drive: otherwise a whole training could go wrong silently.

Importing this module registers one hook for all optimizers of the process. The hook reads each optimizer's parameters
once. After that it only looks at the adapters that it found among them.
"""

import warnings
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import attrs
import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from tunerkit import hooks, injection
from tunerkit.errors import AdapterError, TunerkitWarning
from tunerkit.injection import Tuner
from tunerkit.steps.links import is_attached, optimizer_of


@attrs.define(eq=False)
class _Look:
    """The adapters that an optimizer holds, and those that a warning has named.

    ``seen`` is the optimizer's number of parameter groups and the number of known adapters when ``held`` was filled.
    """

    seen: tuple[int, int] = (0, 0)
    held: WeakSet[Tuner] = attrs.field(factory=WeakSet)
    warned: WeakSet[Tuner] = attrs.field(factory=WeakSet)


_owners = WeakIdKeyDictionary()  # from each parameter of an adapter to a reference to its tuner
_known = 0
_looks: WeakKeyDictionary[Optimizer, _Look] = WeakKeyDictionary()


def warn_of_undriven_steps(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Warn once about each adapter that ``optimizer`` has just moved but does not drive."""
    if torch.compiler.is_compiling():
        return  # a compiled step must not be traced through weak references
    _register_new()
    look = _looks.setdefault(optimizer, _Look())
    if look.seen != (len(optimizer.param_groups), _known):
        look.seen = (len(optimizer.param_groups), _known)
        look.held = _held_by(optimizer)
    for tuner in [tuner for tuner in look.held if tuner not in look.warned]:
        driven = is_attached(tuner) and optimizer_of(tuner) is optimizer
        if not driven and any(p.requires_grad and p.grad is not None for p in _parameters(tuner)):
            look.warned.add(tuner)
            _warn(tuner, optimizer)


def _register_new() -> None:
    """Record the parameters of new tuners. Not when a tuner is created: a copy has no parameters yet then."""
    global _known
    for tuner in list(injection.unseen):
        injection.unseen.discard(tuner)
        if hooks.watches_steps(tuner.method):
            _known += 1
            for parameter in _parameters(tuner):
                _owners[parameter] = ref(tuner)


def _held_by(optimizer: Optimizer) -> WeakSet[Tuner]:
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    found = (_owners[p]() for p in parameters if p in _owners)
    return WeakSet(tuner for tuner in found if tuner is not None)


def _parameters(tuner: Tuner) -> list[torch.nn.Parameter]:
    """Return an adapter's parameters; none if it is in no model any more."""
    try:
        return list(tuner.parameters())
    except AdapterError:
        return []


def _warn(tuner: Tuner, optimizer: Optimizer) -> None:
    driver = "another optimizer drives it" if is_attached(tuner) else "nothing drives it"
    warnings.warn(
        f"an optimizer ({type(optimizer).__name__}) steps adapter {tuner.name!r}, but {driver}: method "
        f"{tuner.method!r} does not see these steps. Call tunerkit.attach with this optimizer. A deep-copied optimizer "
        "has lost its hooks, and a deep-copied model must be attached itself",
        TunerkitWarning,
        stacklevel=4,
    )


register_optimizer_step_post_hook(warn_of_undriven_steps)
