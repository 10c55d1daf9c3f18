"""Drive the methods' step hooks from the optimizer's own: nobody has to remember to call anything."""

import functools
import operator
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, SupportsIndex
from weakref import WeakKeyDictionary, ref

import attrs
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tunerkit import detector, registry
from tunerkit.errors import StepError, TunerkitWarning
from tunerkit.places import refuse_lost
from tunerkit.slots import slots_of
from tunerkit.tuner import Tuner, own_tuners
from tunerkit.withheld import Withheld


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


@attrs.frozen(eq=False)
class Link:
    """The hooks that an optimizer drives a tuner by. They stay until `detach`; the optimizer is remembered after it."""

    optimizer: "ref[Optimizer]"
    handles: tuple[RemovableHandle, ...]


# Not in the tuner: a deep copy of the model must not believe that the original's optimizer drives it. The values hold
# no tuner, else none would ever be freed: the optimizer alone keeps the driver alive.
_links: WeakKeyDictionary[Tuner, Link] = WeakKeyDictionary()


def is_frozen(tuner: Tuner) -> bool:
    """Whether it has parameters and none is trained."""
    own = tuner.parameters()
    first = next(own, None)  # asked at each step: most often the first one tells
    return first is not None and not first.requires_grad and not any(p.requires_grad for p in own)


def takes_part(tuner: Tuner) -> bool:
    """Whether the optimizer's step is one of the adapter's: not while frozen; else if active or given a gradient.

    So adapters that share an optimizer and are trained in turn count their own steps. Under a clock (a Trainer's global
    step) the number of a step is the same for all, and an adapter sees those that it takes part in.
    """
    if is_frozen(tuner):
        return False
    return tuner.turn is not None or any(p.grad is not None for p in tuner.parameters())


def find_optimizer(candidate: object, tuners: Sequence[Tuner]) -> Optimizer:
    """The torch optimizer itself: accelerate and others wrap it and keep it under ``.optimizer``.

    Refused where a method of ``tuners`` needs steps: a wrapper with a state of its own. Lookahead, or an average of
    weights, would put back what an allocation has pruned, in shapes of before.
    """
    while isinstance(inner := getattr(candidate, "optimizer", None), Optimizer):
        needing = [tuner.name for tuner in tuners if registry.get(tuner.method).needs_steps]
        if needing and getattr(candidate, "state", inner.state) is not inner.state:
            wrapper, wrapped = type(candidate).__name__, type(inner).__name__
            raise StepError(
                f"{wrapper} has a state of its own beside that of {wrapped}, where weights may live on that adapter "
                f"{needing[0]!r} prunes; train it with {wrapped} alone, or with a method that needs no steps"
            )
        candidate = inner
    if not isinstance(candidate, Optimizer):
        raise StepError(
            f"attach takes a torch optimizer or a transformers Trainer, got {type(candidate).__name__}; "
            "pass the optimizer that steps the adapter"
        )
    if not _takes_hooks(candidate):
        raise StepError(
            f"{type(candidate).__name__} takes no hooks, since it does not call torch.optim.Optimizer.__init__; "
            "attach one that does: if it wraps one, that one"
        )
    return candidate


def _takes_hooks(optimizer: Optimizer) -> bool:
    try:
        optimizer.register_state_dict_post_hook(lambda *_: None).remove()
    except AttributeError:
        return False
    return True


def check_attachable(tuner: Tuner, optimizer: Optimizer) -> None:
    """Refuse a second attachment, and an adapter that this optimizer would never move, or in vain."""
    if is_attached(tuner):
        others = [name for name, other in own_tuners(tuner.model).items() if not is_attached(other)]
        which = f", adapter={others[0]!r} attaches another" if others else ""
        raise StepError(
            f"adapter {tuner.name!r} is attached already: one optimizer drives it; wrap again for a new run{which}"
        )
    if is_frozen(tuner):
        raise StepError(
            f"adapter {tuner.name!r} is frozen; tunerkit.thaw(model, {tuner.name!r}) trains it on, and "
            "tunerkit.load(..., trainable=True) loads one to be trained"
        )
    if any(p.is_meta for p in tuner.parameters()):
        raise StepError(
            f"adapter {tuner.name!r} is on the meta device, where nothing is trained: accelerate offloads it with the "
            "model. Offload first, then wrap: the adapter then stays on the device where the model runs"
        )
    refuse_lost([tuner])
    _check_held(tuner, optimizer)


def _check_held(tuner: Tuner, optimizer: Optimizer) -> None:
    """Refuse an optimizer that holds nothing of the adapter; warn of one that holds a part of it.

    A method that needs steps judges its own adapters by their training: heads trained in full do not count there.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = {path: {n: p for n, p in slot.named_parameters() if p.requires_grad} for path, slot in tuner.slots()}
    counted = {path: own for path, own in trained.items() if own}
    if registry.get(tuner.method).needs_steps:
        adapters = tuner.adapters()
        counted = {path: own for path, own in counted.items() if path in adapters}
    if counted and not any(id(p) in held for own in counted.values() for p in own.values()):
        raise StepError(
            f"the optimizer holds none of the parameters of adapter {tuner.name!r} at its {len(counted)} places; "
            f"{_BUILD_IT}, or name the adapter that it trains"
        )
    missing = {path: [n for n, p in own.items() if id(p) not in held] for path, own in trained.items()}
    if any(missing.values()):
        warnings.warn(
            f"the optimizer does not hold all that adapter {tuner.name!r} trains, and what it lacks stays as it is "
            f"unless another optimizer moves it: {_grouped(missing)}; {_BUILD_IT}",
            TunerkitWarning,
            stacklevel=5,
        )


_BUILD_IT = "build it from (p for p in model.parameters() if p.requires_grad) after tunerkit.wrap"
_SHOWN = 5


def _grouped(missing: Mapping[str, Sequence[str]]) -> str:
    """What lacks the same at several paths, said once: ``adapter.lam at 0, 2; copy.weight, copy.bias at head``."""
    paths: dict[str, list[str]] = defaultdict(list)
    for path, names in missing.items():
        if names:
            paths[", ".join(names)].append(path)
    return "; ".join(
        f"{names} at {', '.join(at[:_SHOWN])}{f' and {len(at) - _SHOWN} more' if len(at) > _SHOWN else ''}"
        for names, at in paths.items()
    )


def agree_on_total(tuner: Tuner, total_steps: int | None) -> int | None:
    """The total from the call and the config, which must not disagree; required where the method needs steps."""
    configured: int | None = getattr(tuner.config, "total_steps", None)
    if total_steps is not None and configured is not None and total_steps != configured:
        raise StepError(
            f"adapter {tuner.name!r}: the config says total_steps={configured}, training has {total_steps}; "
            "make them equal or leave the config's out"
        )
    total = configured if total_steps is None else total_steps
    total = None if total is None else _as_count(total)
    if total is None and registry.get(tuner.method).needs_steps:
        raise StepError(
            f"method {tuner.method!r} needs the length of training: pass total_steps=... to tunerkit.attach, "
            "or set total_steps in the config"
        )
    return total


def _as_count(total: SupportsIndex) -> int:
    """``total`` as an int; numpy's integers and others that stand for one are fine."""
    try:
        count = 0 if isinstance(total, bool) else operator.index(total)
    except TypeError:
        count = 0
    if count < 1:
        raise StepError(f"total_steps: expected a number of optimizer steps >= 1, got {total!r}")
    return count


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
    states = [
        registry.call("tunerkit_start", tuner.method, tuner=tuner, total_steps=total)
        for tuner, total in zip(tuners, totals, strict=True)
    ]
    for tuner, total, state in zip(tuners, totals, states, strict=True):
        tuner.state, tuner.total_steps, tuner.steps = state, total, 0
        tuner.history.clear()
        driver = Driver(tuner=tuner, clock=clock)
        handles = (
            optimizer.register_step_pre_hook(_uncompiled(_before, driver)),
            optimizer.register_step_post_hook(_uncompiled(_after, driver)),
        )
        _links[tuner] = Link(ref(optimizer), handles)
    return optimizer


def _uncompiled(hook: Callable[..., Any], driver: Driver) -> Callable[..., Any]:
    """Our hook for an optimizer whose step may be compiled: what plugins do there is Python, and changes shapes."""
    hidden: Callable[..., Any] = torch.compiler.disable(functools.partial(hook, driver))
    return hidden


def hold(tuner: Tuner, *handles: RemovableHandle) -> None:
    """Keep further hooks of the optimizer that drives ``tuner`` until `detach`."""
    link = _links[tuner]
    _links[tuner] = attrs.evolve(link, handles=(*link.handles, *handles))


def detach(tuner: Tuner) -> None:
    """Undo `attach`; a tuner that is not attached stays as it is."""
    link = _links.get(tuner)
    if link is not None:
        for handle in link.handles:
            handle.remove()
        _links[tuner] = attrs.evolve(link, handles=())


def is_attached(tuner: Tuner) -> bool:
    """Whether an optimizer drives ``tuner`` now."""
    link = _links.get(tuner)
    return link is not None and bool(link.handles) and link.optimizer() is not None


def optimizer_of(tuner: Tuner) -> Optimizer | None:
    """The optimizer that drives ``tuner``, or that drove it last and is still there."""
    link = _links.get(tuner)
    return None if link is None else link.optimizer()


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
    detector.report(tuner.model)
    with torch.no_grad():
        kept = registry.call("tunerkit_before_step", tuner.method, tuner=tuner, step=step, grad_scale=grad_scale)
        driver.withheld.take_(kept, grad_scale)


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
    tuner.steps = driver.next_step()
    with torch.no_grad():
        ranks = registry.call("tunerkit_after_step", tuner.method, tuner=tuner, step=tuner.steps)
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
