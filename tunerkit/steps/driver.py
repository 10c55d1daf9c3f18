"""Call the methods' step hooks from the optimizer's own hooks, so that users do not have to call anything."""

import functools
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import attrs
import torch
from torch import Tensor
from torch.optim import Optimizer

from tunerkit import hooks, injection, patterns
from tunerkit.engine import Alone, Engine
from tunerkit.errors import StepError, TunerkitWarning
from tunerkit.injection import Link, Tuner
from tunerkit.libraries import torch_private
from tunerkit.steps.checks import agree_on_total, check_attachable, find_optimizer
from tunerkit.steps.completing import complete_
from tunerkit.steps.held import held_of
from tunerkit.steps.links import detach, is_attached, note_engine, optimizer_of
from tunerkit.steps.withheld import Withheld


@attrs.define(eq=False)
class _Driver:
    """The connection between one tuner and one optimizer.

    ``clock`` returns the number of the current step, from 1. ``withheld`` are the gradients that the method withholds
    from the current step, and ``fixed`` the values that are put back after it, by parameter, where the engine's
    optimizer moves a parameter without a gradient too. An ``idle`` step trains nothing.
    """

    tuner: Tuner
    clock: Callable[[], int] | None
    engine: Engine
    fixed: dict[str, Tensor] = attrs.field(factory=dict)
    warned_past_total: bool = False
    idle: bool = False
    withheld: Withheld = attrs.field(factory=Withheld)

    def next_step(self) -> int:
        return self.tuner.steps + 1 if self.clock is None else self.clock()


def drive(
    tuners: Sequence[Tuner],
    candidate: object,
    *,
    total_steps: int | None,
    clock: Callable[[], int] | None = None,
    engine: Engine | None = None,
) -> Optimizer | None:
    """Start the methods' training states, and register step hooks on an optimizer.

    If this raises, no adapter is attached.

    Args:
        tuners: The adapters to drive.
        candidate: A torch optimizer, or a wrapper around one.
        total_steps: The length of training in optimizer steps, if it is known.
        clock: Returns the number of the current step, from 1; by default the steps of each adapter are counted.
        engine: What the processes of the training do together; by default nothing.

    Returns:
        The torch optimizer; None if it takes no hooks, so that no step is counted.
    """
    optimizer = find_optimizer(candidate, tuners)
    for tuner in tuners:
        check_attachable(tuner, optimizer)
    totals = [agree_on_total(tuner, total_steps) for tuner in tuners]
    engine = Alone() if engine is None else engine
    if optimizer is not None:
        _refuse_own_losses(optimizer, engine)
        note_engine(optimizer, engine)
    for tuner in tuners:
        detach(tuner)  # from an optimizer that is gone
    kept = engine.begin_([held_of(*pair, optimizer) for pair in zip(tuners, totals, strict=True)], optimizer)
    links = [tuner.progress.link for tuner in tuners]
    try:
        states = [_start(tuner, total, optimizer, engine) for tuner, total in zip(tuners, totals, strict=True)]
    except BaseException:
        for tuner, link in zip(tuners, links, strict=True):
            tuner.progress.link = link
        for handle in itertools.chain(*kept.values()):
            handle.remove()
        raise
    for tuner, total, state in zip(tuners, totals, states, strict=True):
        progress = tuner.progress
        progress.state, progress.total_steps, progress.steps = state, total, 0
        progress.history.clear()
        if optimizer is None:
            continue
        driver = _Driver(tuner=tuner, clock=clock, engine=engine)
        handles = (
            optimizer.register_step_pre_hook(_uncompiled(_before, driver)),
            optimizer.register_step_post_hook(_uncompiled(_after, driver)),
        )
        completing = optimizer.register_state_dict_post_hook(functools.partial(complete_, tuner))
        progress.link = Link(ref(optimizer), (*handles, completing, *kept.get(tuner.name, ())), engine)
    return optimizer


def _refuse_own_losses(optimizer: Optimizer, engine: Engine) -> None:
    """Reject an optimizer that decides by the loss, which each process has of its own part of the data."""
    if engine.is_shared and isinstance(optimizer, torch.optim.LBFGS):
        raise StepError(
            "LBFGS chooses its steps by the loss, and each process has another one: they would drift apart. Use "
            "another optimizer, or one process"
        )


def _leads(driver: _Driver, optimizer: Optimizer) -> bool:
    """Whether this adapter is the first that the optimizer drives now, and so the one that tells the engine."""
    tuners = injection.wrapped_of(driver.tuner.model).tuners.values()
    driven = (t for t in tuners if t.engine is driver.engine and is_attached(t) and optimizer_of(t) is optimizer)
    return next(driven, None) is driver.tuner


def _start(tuner: Tuner, total: int | None, optimizer: Optimizer | None, engine: Engine) -> object | None:
    """Ask the method for its training state. The hook finds the engine already, through a link without handles."""
    if optimizer is None:
        seen = engine.whole([slot for _, slot in tuner.slots()], gradients=False)
    else:
        tuner.progress.link = Link(ref(optimizer), (), engine)
        seen = tuner.as_hooks_see_it()
    with patterns.one_allowance(), seen:
        return hooks.start(tuner, total, optimizer)


def _uncompiled(hook: Callable[..., Any], driver: _Driver) -> Callable[..., Any]:
    """Exclude a hook from a compiled optimizer step: plugins run any Python code there, and may change shapes."""
    hidden: Callable[..., Any] = torch.compiler.disable(functools.partial(hook, driver))
    return hidden


def _before(
    driver: _Driver, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Run inside ``optimizer.step``, before anything is updated.

    With a closure the gradients are computed later, inside it, perhaps several times. Depending on the torch release,
    ``args`` starts with the optimizer or not, so a positional closure is recognised by being callable.
    """
    # Torch's distributed checkpoint steps an optimizer without state to make one, so most steps need no look.
    driver.idle = not optimizer.state and torch_private.in_distributed_checkpoint()
    if driver.idle:
        return None
    # If the last step raised, no hook ran after it. If its gradients were cleared since then, so are the withheld ones.
    if driver.withheld.gradients and all(parameter.grad is None for parameter in driver.tuner.parameters()):
        driver.withheld.gradients.clear()
    driver.withheld.put_back_(stepped=False)
    _refuse_misplaced(driver.tuner)
    if kwargs.get("closure") is not None:
        return args, {**kwargs, "closure": _wrap_closure(driver, optimizer, kwargs["closure"])}
    if args and args[-1] is not optimizer and callable(args[-1]):
        return (*args[:-1], _wrap_closure(driver, optimizer, args[-1])), kwargs
    _call_before_step(driver, optimizer)
    return None


def _refuse_misplaced(tuner: Tuner) -> None:
    """Reject a step while the model is merged, or after the adapter was removed by hand.

    This runs at each step, so it looks only at the adapter's own modules, not at the whole model.
    """
    found = [injection.slots_of(module) for module in tuner.modules().values()]
    if None in found:
        list(tuner.slots())  # raises an error that names the module
    if any(slots is not None and slots.merged for slots in found):
        raise StepError("the model is merged: a step would train nothing. Call tunerkit.unmerge before more training")


def _wrap_closure(driver: _Driver, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
    @functools.wraps(closure)
    def then_before_step() -> Any:
        driver.withheld.put_back_(stepped=False)  # the closure may run several times, and may accumulate
        loss = closure()
        _call_before_step(driver, optimizer)
        return loss

    return then_before_step


def _call_before_step(driver: _Driver, optimizer: Optimizer) -> None:
    tuner = driver.tuner
    if _leads(driver, optimizer):
        driver.engine.before_step_(optimizer)
    if not injection.takes_part(tuner):
        return
    injection.report(tuner.model)
    # Where the engine's step takes the gradients away, they are kept for what acts after it.
    acts = hooks.changes_gradients if driver.engine.withholds else hooks.watches_steps
    if not acts(tuner.method):
        return
    # Under a GradScaler a fused optimizer steps on scaled gradients; the scale is its attribute, if there is one.
    grad_scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    with torch.no_grad(), tuner.as_hooks_see_it(gradients=True) as outside:
        withheld = hooks.before_step(tuner, driver.next_step(), grad_scale)
        if driver.engine.withholds:
            driver.withheld.take_([outside(parameter) for parameter in withheld], grad_scale)
        else:
            fixed = {id(parameter) for parameter in withheld}
            driver.fixed = {name: p.clone() for name, p in tuner.named_parameters() if id(p) in fixed}


def _after(driver: _Driver, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run after the update. A step that a fused optimizer skipped, because gradients overflowed, does not count."""
    tuner = driver.tuner
    if driver.idle:
        return
    skipped = bool(getattr(optimizer, "found_inf", None))
    driver.withheld.put_back_(stepped=not skipped)
    if skipped or not injection.takes_part(tuner):
        return
    tuner.progress.steps = driver.next_step()
    if hooks.watches_steps(tuner.method):
        with torch.no_grad(), tuner.as_hooks_see_it(gradients=True):
            _put_back_fixed_(driver)
            tuner.record(hooks.after_step(tuner, tuner.steps))
    _warn_past_total(driver)


def _put_back_fixed_(driver: _Driver) -> None:
    fixed, driver.fixed = driver.fixed, {}
    if fixed:
        for name, parameter in driver.tuner.named_parameters():
            if name in fixed:
                parameter.copy_(fixed[name])


def _warn_past_total(driver: _Driver) -> None:
    tuner = driver.tuner
    if tuner.total_steps is not None and tuner.steps > tuner.total_steps and not driver.warned_past_total:
        driver.warned_past_total = True
        warnings.warn(
            f"adapter {tuner.name!r}: step {tuner.steps} is after total_steps={tuner.total_steps}; "
            "the ranks stay as the final allocation set them",
            TunerkitWarning,
            stacklevel=2,
        )
