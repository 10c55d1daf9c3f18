"""Call the methods' step hooks from the optimizer's own hooks, so that users need no extra call in their loop.

`drive` resolves everything that steps need once, into a `Drive`; each step then only calls the method's plugin.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any
from weakref import ref

import attrs
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tunerkit import hooks, injection
from tunerkit.errors import StepError, warn
from tunerkit.hooks import Engine, same
from tunerkit.injection import Link, Slot, Slots, Tuner, Wrapped, modules_in, slots_in
from tunerkit.layers import torch_private
from tunerkit.paths import CHILD
from tunerkit.steps.attachment import (
    LastGradient,
    agree_on_total,
    check_attachable,
    detach,
    find_optimizer,
    hold,
    is_attached,
    watch_,
)
from tunerkit.steps.resizing import ENGINE, complete_, optimizer_of


@attrs.frozen(eq=False)
class Place:
    """One adapted module: its slots, one adapter's slot among them, and the live dicts of torch that contain both."""

    children: Mapping[str, nn.Module | None]
    slots: Slots
    own: Mapping[str, nn.Module | None]
    slot: Slot


@attrs.define(eq=False)
class Withheld:
    """Gradients that are removed during the current step, and their scale.

    An optimizer skips a parameter without a gradient: it applies no update, no momentum and no weight decay.
    """

    gradients: list[tuple[Tensor, Tensor]] = attrs.field(factory=list)
    grad_scale: Tensor | None = None

    def take_(self, parameters: Iterable[Tensor], grad_scale: Tensor | None) -> None:
        """Remove and keep the gradients of ``parameters``; ``grad_scale`` (0-d) is their scale, None for 1."""
        self.grad_scale = grad_scale
        for parameter in parameters:
            if parameter.grad is not None:
                self.gradients.append((parameter, parameter.grad))
                parameter.grad = None

    @torch.no_grad()
    def put_back_(self, *, stepped: bool) -> None:
        """Put back every withheld gradient; ``stepped`` is False if the step failed. A second call does nothing."""
        held, self.gradients = self.gradients, []
        # A fused optimizer has divided the other gradients by the scale, so these are divided too.
        if stepped and self.grad_scale is not None:
            for device in {grad.device for _, grad in held}:
                own = [grad for _, grad in held if grad.device == device]
                torch_private.divide_(own, self.grad_scale.to(device))
        for parameter, grad in held:
            if stepped:
                parameter.grad = grad
            # After an interrupted step a newer gradient may exist, or the parameter may have another shape.
            elif parameter.grad is None and parameter.shape == grad.shape:
                parameter.grad = grad.to(parameter)


@attrs.define(eq=False)
class Drive:
    """The connection of a tuner to its optimizer: objects that every step uses, and the state between steps."""

    tuner: Tuner
    wrapped: Wrapped
    places: Sequence[Place]
    callers: hooks.Callers
    engine: Engine
    meets: bool  # the engine acts before a step
    gathers: bool  # the engine gathers the adapter for the method's hooks
    clock: Callable[[], int] | None  # the number of the current step, from 1; None to count the steps
    last: LastGradient
    withheld: Withheld = attrs.field(factory=Withheld)
    # Values to put back after the step, by name, if the engine's optimizer updates parameters without a gradient too.
    fixed: dict[str, Tensor] = attrs.field(factory=dict)
    is_idle: bool = False  # the current step only creates optimizer state
    was_past_total: bool = False  # the warning about steps after total_steps was given


def drive(
    tuners: Sequence[Tuner],
    candidate: object,
    *,
    total_steps: int | None,
    clock: Callable[[], int] | None = None,
    engine: Engine | None = None,
) -> Optimizer | None:
    """Start the methods' training states, and register step hooks on an optimizer. If this raises, nothing is changed.

    Args:
        tuners: The adapters to drive.
        candidate: A torch optimizer, or a wrapper around one.
        total_steps: The length of training in optimizer steps, if it is known.
        clock: Returns the number of the current step, from 1; by default the steps of each adapter are counted.
        engine: The engine of the process group; by default, one process trains alone.

    Returns:
        The torch optimizer; None if it does not support hooks, so that no step is counted.
    """
    optimizer = find_optimizer(candidate, tuners)
    for tuner in tuners:
        check_attachable(tuner, optimizer)
    totals = [agree_on_total(tuner, total_steps) for tuner in tuners]
    engine = Engine() if engine is None else engine
    with ExitStack() as undo:
        if optimizer is not None:
            undo.callback(vars(optimizer).update, {ENGINE: vars(optimizer).get(ENGINE)})
            vars(optimizer)[ENGINE] = engine
        for tuner, total in zip(tuners, totals, strict=True):
            detach(tuner)  # from an optimizer that is gone
            undo.callback(_restore_, tuner, attrs.evolve(tuner.progress), tuner.state, tuner.engine)
            tuner.progress.total_steps = total
            if optimizer is not None:
                tuner.progress.link = Link(ref(optimizer))
        kept = engine.begin_(tuners, optimizer)
        for handles in kept.values():
            for handle in handles:
                undo.callback(handle.remove)
        for tuner in tuners:
            tuner.engine = engine  # set before the hook, which may use it
            with injection.as_hooks_see_it(tuner):
                begin, total = hooks.specs.tunerkit_start, tuner.total_steps
                tuner.state = hooks.ask(begin, tuner.method, tuner=tuner, total_steps=total, optimizer=optimizer)
            tuner.progress.steps, tuner.progress.history = 0, []
            if optimizer is not None:
                hold(tuner, *kept.get(tuner.name, ()))
                _register_(tuner, optimizer, clock)
        undo.pop_all()
    return optimizer


def _restore_(tuner: Tuner, before: injection.Progress, state: object | None, engine: Engine) -> None:
    detach(tuner)
    tuner.state, tuner.engine, progress = state, engine, tuner.progress
    progress.link, progress.total_steps = before.link, before.total_steps
    progress.steps, progress.history = before.steps, before.history


def _register_(tuner: Tuner, optimizer: Optimizer, clock: Callable[[], int] | None) -> None:
    """Build the `Drive` that an adapter's steps use, and register the optimizer's hooks."""
    modules = modules_in(tuner)
    places = [
        Place(torch_private.own_children(modules[path]), slots, torch_private.own_children(slots), slot)
        for path, slot in slots_in(tuner)
        if (slots := injection.slots_of(modules[path])) is not None
    ]
    callers, wrapped, engine = hooks.callers_of(tuner), injection.wrapped_of(tuner.model), tuner.engine
    meets = type(engine).before_step_ is not Engine.before_step_
    gathers = engine.splits or not engine.withholds
    last = watch_(tuner) if hooks.watches_steps(tuner.method) else LastGradient()
    found = Drive(tuner, wrapped, places, callers, engine, meets, gathers, clock, last)
    # Excluded from a compiled optimizer step: plugins run arbitrary Python code, and may change shapes.
    hold(tuner, optimizer.register_step_pre_hook(torch.compiler.disable(functools.partial(_before, found))))
    hold(tuner, optimizer.register_step_post_hook(torch.compiler.disable(functools.partial(_after, found))))
    hold(tuner, optimizer.register_state_dict_post_hook(functools.partial(complete_, tuner)))


def _before(
    drive: Drive, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Step pre-hook of the optimizer: call the method's hook. ``args`` begins with the optimizer.

    If the step has a closure, which computes the gradients, the method's hook is called at the closure's end.
    """
    # Torch's distributed checkpoint steps an optimizer only if it has no state yet, so that it creates one.
    drive.is_idle = not optimizer.state and torch_private.in_distributed_checkpoint()
    if drive.is_idle:
        return None
    drive.last.version = None
    drive.fixed = {}  # left by a step that was skipped or raised
    if drive.withheld.gradients:
        # The last step raised before its post-hook. If the user has cleared the gradients since, clear these too.
        if all(parameter.grad is None for parameter in drive.tuner.parameters()):
            drive.withheld.gradients.clear()
        drive.withheld.put_back_(stepped=False)
    _refuse_misplaced(drive)
    if kwargs.get("closure") is not None:
        return args, {**kwargs, "closure": functools.partial(_run_closure, drive, optimizer, kwargs["closure"])}
    if len(args) > 1 and callable(args[1]):
        return (optimizer, functools.partial(_run_closure, drive, optimizer, args[1]), *args[2:]), kwargs
    _call_before_step(drive, optimizer)
    return None


def _refuse_misplaced(drive: Drive) -> None:
    """Raise an error if the model is merged at a step, or if the adapter was removed by hand from a module."""
    name, is_merged = drive.tuner.name, False
    is_there = drive.wrapped.tuners.get(name) is drive.tuner
    for place in drive.places:  # no generator, for speed: this runs in every step
        is_there = is_there and place.children.get(CHILD) is place.slots and place.own.get(name) is place.slot
        is_merged = is_merged or bool(place.slots.merged)
    if not is_there:
        slots_in(drive.tuner)  # raises an error that names the module
    if is_merged:
        raise StepError("the model is merged: a step would train nothing. Call tunerkit.unmerge before more training")


def _run_closure(drive: Drive, optimizer: Optimizer, closure: Callable[[], Any]) -> Any:
    """Run a step's closure, then the method's hook; return the loss. One step may call this several times."""
    drive.withheld.put_back_(stepped=False)
    loss = closure()
    drive.last.version = None
    _call_before_step(drive, optimizer)
    return loss


def _call_before_step(drive: Drive, optimizer: Optimizer) -> None:
    tuner, engine, caller = drive.tuner, drive.engine, drive.callers.before_step
    if drive.meets and _leads(drive, optimizer):
        engine.before_step_(optimizer)
    if not _takes_part(drive):
        return
    if injection.WATCHED in vars(tuner.model):
        injection.report(tuner.model)
    # If the engine's step removes the gradients, `seen` keeps them for the hook after the step.
    if caller is None and (engine.withholds or drive.callers.after_step is None):
        return
    # Under a GradScaler a fused optimizer steps on scaled gradients, and has the scale as an attribute.
    grad_scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    seen = injection.as_hooks_see_it(tuner, gradients=True) if drive.gathers else nullcontext(same)
    with torch.no_grad(), seen as outside:
        if caller is None:
            return
        try:
            step = tuner.progress.steps + 1 if drive.clock is None else drive.clock()
            given = {"tuner": tuner, "step": step, "grad_scale": grad_scale}
            answer = caller.function(*map(given.__getitem__, caller.takes))
            kept = None if answer is None else caller.check(answer)
        except BaseException as error:
            caller.blame(error)
            raise
        if kept is None:
            return
        if engine.withholds:
            drive.withheld.take_([outside(parameter) for parameter in kept], grad_scale)
        else:
            fixed = {id(parameter) for parameter in kept}
            drive.fixed = {name: p.clone() for name, p in tuner.named_parameters() if id(p) in fixed}


def _leads(drive: Drive, optimizer: Optimizer) -> bool:
    """Whether this adapter is the first one that the optimizer drives: only the first calls the engine in a step."""
    for tuner in drive.wrapped.tuners.values():
        if tuner.engine is drive.engine and is_attached(tuner) and optimizer_of(tuner) is optimizer:
            return tuner is drive.tuner
    return False


def _takes_part(drive: Drive) -> bool:
    """Whether the adapter takes part in an optimizer step: it is not frozen, and is active or has a gradient.

    So an adapter counts only its own steps, unless there is a clock (a Trainer's global step), which numbers all steps.
    """
    first = next(drive.places[0].slot.parameters(), None)  # usually enough
    if (first is None or not first.requires_grad) and injection.is_frozen(drive.tuner):
        return False
    return drive.tuner.name in drive.wrapped.active or any(
        parameter.grad is not None for place in drive.places for parameter in place.slot.parameters()
    )


def _after(drive: Drive, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Step post-hook of the optimizer: count the step and call the method's hook, unless gradients overflowed."""
    if drive.is_idle:
        return
    tuner, callers = drive.tuner, drive.callers
    skipped = bool(getattr(optimizer, "found_inf", None))
    if drive.withheld.gradients:
        drive.withheld.put_back_(stepped=not skipped)
    if skipped or not _takes_part(drive):
        return
    step = tuner.progress.steps = tuner.progress.steps + 1 if drive.clock is None else drive.clock()
    if callers.after_step is not None or callers.before_step is not None:
        seen = injection.as_hooks_see_it(tuner, gradients=True) if drive.gathers else nullcontext(same)
        with torch.no_grad(), seen:
            if drive.fixed:
                for name, parameter in tuner.named_parameters():
                    if name in drive.fixed:
                        parameter.copy_(drive.fixed.pop(name))
            if callers.after_step is not None:
                _call_after_step(drive, callers.after_step, step)
    total = tuner.progress.total_steps
    if total is not None and step > total and not drive.was_past_total:
        drive.was_past_total = True
        warn(
            f"adapter {tuner.name!r}: step {step} is after total_steps={total}; the ranks stay as the final allocation "
            "set them"
        )


def _call_after_step(drive: Drive, caller: hooks.Caller, step: int) -> None:
    """Call the method's hook; if it returns an allocation, add the allocation to the history and notify all plugins."""
    tuner, budget, asked, spent = drive.tuner, drive.callers.budget, caller, None
    try:
        given = {"tuner": tuner, "step": step}
        answer = caller.function(*map(given.__getitem__, caller.takes))
        if answer is None:
            return
        if budget is not None:
            asked, now = budget, {"tuner": tuner, "step": None}
            in_force = budget.function(*map(now.__getitem__, budget.takes))
            spent = None if in_force is None else budget.check(in_force)
        asked = caller
        ranks = caller.check(answer)
    except BaseException as error:
        asked.blame(error)
        raise
    spent = sum(ranks.values()) if spent is None else spent
    hooks.ranks_changed(tuner, tuner.progress.history, step, spent, ranks)
