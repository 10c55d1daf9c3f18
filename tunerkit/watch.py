"""Tell of an optimizer that steps an adapter without driving it: what would otherwise be silent for a whole training.

Importing this registers one hook for all optimizers of the process. It looks only at adapters whose method acts on
steps, and once at each pair of optimizer and adapter.
"""

import warnings
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from tunerkit import registry
from tunerkit.errors import AdapterError, TunerkitWarning
from tunerkit.steps import is_attached, optimizer_of
from tunerkit.tuner import Tuner, alive

_judged: WeakKeyDictionary[Optimizer, WeakSet[Tuner]] = WeakKeyDictionary()


def tell_of_undriven_steps(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Warn, once, of each adapter that ``optimizer`` has just moved although something else, or nothing, drives it."""
    if torch.compiler.is_compiling():
        return  # somebody's compiled step must not be traced through weak sets
    judged = _judged.setdefault(optimizer, WeakSet())
    for tuner in [tuner for tuner in alive if tuner not in judged]:
        if is_attached(tuner) and optimizer_of(tuner) is optimizer:
            continue  # as long as it is: it may be detached
        own = _moved(tuner)
        if not own or not registry.implements("tunerkit_after_step", tuner.method):
            continue
        judged.add(tuner)
        if any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            driver = "another optimizer drives it" if is_attached(tuner) else "nothing drives it"
            warnings.warn(
                f"an optimizer ({type(optimizer).__name__}) steps adapter {tuner.name!r}, but {driver}: method "
                f"{tuner.method!r} does not see these steps. Call tunerkit.attach with this optimizer; one that was "
                "deep-copied lost its hooks, and a deep-copied model is attached by itself",
                TunerkitWarning,
                stacklevel=3,
            )


def _moved(tuner: Tuner) -> set[int]:
    """The ids of its parameters that have a gradient; none if the adapter is in no model, or somebody tore it out."""
    try:
        return {id(p) for p in tuner.parameters() if p.requires_grad and p.grad is not None}
    except AdapterError:
        return set()


register_optimizer_step_post_hook(tell_of_undriven_steps)
