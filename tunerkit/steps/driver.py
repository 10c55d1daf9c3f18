"""Drive the methods' step hooks from the optimizer's own: nobody has to remember to call anything."""

import functools
import warnings
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any
from weakref import ref

import attrs
import torch
from torch import Tensor
from torch.optim import Optimizer

from tunerkit import hooks
from tunerkit.errors import StepError, TunerkitWarning
from tunerkit.injection import Link, Tuner, report, slots_of, takes_part
from tunerkit.steps.checks import agree_on_total, check_attachable, find_optimizer
from tunerkit.steps.withheld import Withheld


@attrs.define(eq=False)
class Driver:
    """What connects one tuner with one optimizer. ``clock`` gives the number of the step being taken, from 1.

    ``withheld`` are the gradients that the method keeps from the step being taken.
    """

    tuner: Tuner
    clock: Callable[[], int] | None
    told_past_total: bool = False
    withheld: Withheld = attrs.field(factory=Withheld)

    def next_step(self) -> int:
        return self.tuner.steps + 1 if self.clock is None else self.clock()


def drive(
    tuners: Sequence[Tuner],
    candidate: object,
    *,
    total_steps: int | None,
    clock: Callable[[], int] | None = None,
) -> Optimizer:
    """Start the methods' training states and hook into the optimizer that ``candidate`` is or wraps, which is returned.

    All of ``tuners``, or none if one is refused.
    """
    optimizer = find_optimizer(candidate, tuners)
    for tuner in tuners:
        check_attachable(tuner, optimizer)
    totals = [agree_on_total(tuner, total_steps) for tuner in tuners]
    states = [hooks.start(tuner, total) for tuner, total in zip(tuners, totals, strict=True)]
    for tuner, total, state in zip(tuners, totals, states, strict=True):
        progress = tuner.progress
        progress.state, progress.total_steps, progress.steps = state, total, 0
        progress.history.clear()
        driver = Driver(tuner=tuner, clock=clock)
        handles = (
            optimizer.register_step_pre_hook(_uncompiled(_before, driver)),
            optimizer.register_step_post_hook(_uncompiled(_after, driver)),
        )
        progress.link = Link(ref(optimizer), handles)
    return optimizer


def _uncompiled(hook: Callable[..., Any], driver: Driver) -> Callable[..., Any]:
    """Our hook for an optimizer whose step may be compiled: what plugins do there is Python, and changes shapes."""
    hidden: Callable[..., Any] = torch.compiler.disable(functools.partial(hook, driver))
    return hidden


def _before(
    driver: Driver, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Fires inside ``optimizer.step`` before anything is updated.

    ``args`` begins with the optimizer itself or not, depending on the torch release: a closure is found by being
    callable.
    """
    driver.withheld.put_back_(stepped=False)  # if the last step raised, no hook fired after it
    _refuse_misplaced(driver.tuner)
    closure = kwargs.get("closure")
    if closure is not None:
        return args, {**kwargs, "closure": _wrap_closure(driver, optimizer, closure)}
    # With a closure the gradients come later, inside it, and perhaps several times.
    if args and args[-1] is not optimizer and callable(args[-1]):
        return (*args[:-1], _wrap_closure(driver, optimizer, args[-1])), kwargs
    _call_before_step(driver, optimizer)
    return None


def _refuse_misplaced(tuner: Tuner) -> None:
    """Refuse a step while merged weights stand where the adapter is, or where it was torn out.

    Each step asks this, and so of the adapter's own places and not of the whole model.
    """
    found = [slots_of(place.module) for place in chain(tuner.targets, tuner.copies, tuner.biases)]
    if None in found:
        list(tuner.slots())  # raises, and names the place
    if any(slots is not None and slots.merged for slots in found):
        raise StepError("the model is merged: a step would train nothing. Call tunerkit.unmerge before training on")


def _wrap_closure(driver: Driver, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
    @functools.wraps(closure)
    def then_before_step() -> Any:
        driver.withheld.put_back_(stepped=False)  # the closure may run several times, and may accumulate
        loss = closure()
        _call_before_step(driver, optimizer)
        return loss

    return then_before_step


def _call_before_step(driver: Driver, optimizer: Optimizer) -> None:
    # A fused optimizer under GradScaler steps on scaled gradients and carries the scale as an attribute.
    grad_scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    if not takes_part(driver.tuner):
        return
    tuner, step = driver.tuner, driver.next_step()
    report(tuner.model)
    with torch.no_grad():
        driver.withheld.take_(hooks.before_step(tuner, step, grad_scale), grad_scale)


def _after(driver: Driver, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Fires after the update; not for a step that a fused optimizer skipped because its gradients overflowed."""
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
    skipped = found_inf is not None and bool(found_inf)
    driver.withheld.put_back_(stepped=not skipped)
    if skipped:
        return
    if not takes_part(driver.tuner):
        return
    tuner = driver.tuner
    tuner.progress.steps = driver.next_step()
    with torch.no_grad():
        ranks = hooks.after_step(tuner, tuner.steps)
    tuner.record(ranks)
    _warn_past_total(driver)


def _warn_past_total(driver: Driver) -> None:
    tuner = driver.tuner
    if tuner.total_steps is not None and tuner.steps > tuner.total_steps and not driver.told_past_total:
        driver.told_past_total = True
        warnings.warn(
            f"adapter {tuner.name!r}: step {tuner.steps} lies past total_steps={tuner.total_steps}; "
            "ranks stay as the final allocation left them",
            TunerkitWarning,
            stacklevel=2,
        )
