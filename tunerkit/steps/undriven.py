"""Stop or warn if an optimizer steps an adapter that it does not drive: a whole training could go wrong silently.

A method that needs steps stops at its first step if nothing drives it: it could never be saved. If the optimizer
drives other adapters, somebody chose these, and may attach the others later: then there is a warning.

One hook serves all optimizers of the process. It reads each optimizer's parameters once. After that it only looks at
the adapters that it found among them.
"""

import warnings
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import attrs
import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from tunerkit import hooks, injection
from tunerkit.errors import AdapterError, StepError, TunerkitWarning
from tunerkit.injection import Tuner
from tunerkit.libraries import torch_private
from tunerkit.steps.links import is_attached, optimizer_of


@attrs.define(eq=False)
class _Look:
    """The adapters that an optimizer holds, and those that a warning has named.

    ``seen`` is the optimizer's number of parameter groups and the number of known adapters when ``held`` was filled.
    """

    seen: tuple[int, int] = (0, 0)
    held: WeakSet[Tuner] = attrs.field(factory=WeakSet)
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
    """Watch all optimizers from now on, if ``method`` acts on their steps."""
    if not _watch.registered and hooks.watches_steps(method):
        _register()


def _register() -> None:
    """Register the one hook of the process."""
    if not _watch.registered:
        _watch.registered = True
        register_optimizer_step_post_hook(report_undriven_steps)


injection.unseen.notify = _register


def report_undriven_steps(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Look at each adapter that ``optimizer`` has just moved but does not drive: warn once, or raise `StepError`."""
    if torch.compiler.is_compiling():
        return  # a compiled step must not be traced through weak references
    _register_new()
    look = _watch.looks.setdefault(optimizer, _Look())
    if look.seen != (len(optimizer.param_groups), _watch.seen):
        look.seen = (len(optimizer.param_groups), _watch.seen)
        look.held = _held_by(optimizer)
    for tuner in [tuner for tuner in look.held if tuner not in look.warned]:
        if not _drives_any(optimizer, [tuner]) and any(
            p.requires_grad and p.grad is not None for p in _parameters(tuner)
        ):
            if torch_private.in_distributed_checkpoint():
                return  # this step only fills in the optimizer's state
            if tuner.needs_steps and not is_attached(tuner) and not _drives_any(optimizer, look.held):
                _refuse(tuner, optimizer)
            look.warned.add(tuner)
            _warn(tuner, optimizer)


def _register_new() -> None:
    """Record the parameters of new tuners. Not when a tuner is created: a copy has no parameters yet then."""
    for tuner in list(injection.unseen):
        injection.unseen.discard(tuner)
        if hooks.watches_steps(tuner.method):
            _watch.seen += 1
            _watch.tuners.add(tuner)


def _drives_any(optimizer: Optimizer, tuners: Iterable[Tuner]) -> bool:
    return any(is_attached(tuner) and optimizer_of(tuner) is optimizer for tuner in tuners)


def _held_by(optimizer: Optimizer) -> WeakSet[Tuner]:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return WeakSet(tuner for tuner in _watch.tuners if not held.isdisjoint(map(id, _parameters(tuner))))


def _parameters(tuner: Tuner) -> list[torch.nn.Parameter]:
    """Return the parameters of the method's own adapters; none if they are in no model any more.

    Without trained copies and biases: one may train a new head alone before.
    """
    try:
        return [parameter for adapter in tuner.adapters().values() for parameter in adapter.parameters()]
    except AdapterError:
        return []


def _refuse(tuner: Tuner, optimizer: Optimizer) -> None:
    raise StepError(
        f"an optimizer ({type(optimizer).__name__}) steps adapter {tuner.name!r}, but nothing drives it: method "
        f"{tuner.method!r} would not see these steps, and the adapter could not be saved. Before training, call "
        "tunerkit.attach(model, optimizer, total_steps=...), or with a Trainer tunerkit.attach(model, trainer). A "
        "deep-copied optimizer has lost its hooks, and a deep-copied model must be attached itself; to train without "
        f"this adapter, call tunerkit.freeze(model, {tuner.name!r})"
    )


def _warn(tuner: Tuner, optimizer: Optimizer) -> None:
    driver = "another optimizer drives it" if is_attached(tuner) else "nothing drives it"
    warnings.warn(
        f"an optimizer ({type(optimizer).__name__}) steps adapter {tuner.name!r}, but {driver}: method "
        f"{tuner.method!r} does not see these steps. Call tunerkit.attach with this optimizer. A deep-copied optimizer "
        "has lost its hooks, and a deep-copied model must be attached itself",
        TunerkitWarning,
        stacklevel=4,
    )
