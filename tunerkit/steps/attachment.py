"""Whether an optimizer drives an adapter: what is checked before, and what is said if another one, or none, steps it.

A forgotten `attach` would let a whole training go wrong without a word. So a wrapped model looks at its adapters before
each forward, and an adapter in each backward: if its values changed since its last gradient, an optimizer moved them.
"""

import functools
import operator
import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol, SupportsIndex, runtime_checkable
from weakref import ref

import attrs
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tunerkit import hooks, injection
from tunerkit.errors import StepError, shown, warn
from tunerkit.hooks import Engine, Removable
from tunerkit.injection import Tuner, slots_in
from tunerkit.layers import torch_private
from tunerkit.paths import few

_BUILD_IT = "build it from (p for p in model.parameters() if p.requires_grad) after tunerkit.wrap"


def is_attached(tuner: Tuner) -> bool:
    """Whether an optimizer currently drives ``tuner``."""
    link = tuner.progress.link
    return link is not None and bool(link.handles) and link.optimizer() is not None


def hold(tuner: Tuner, *handles: Removable) -> None:
    """Store more hook handles of the optimizer that drives ``tuner``; `detach` removes them."""
    link = tuner.progress.link
    assert link is not None
    link.handles.extend(handles)


def detach(tuner: Tuner) -> None:
    """Undo `attach`. If ``tuner`` is not attached, nothing happens."""
    if (link := tuner.progress.link) is not None:
        for handle in link.handles:
            handle.remove()
        link.handles.clear()


# --- Before attaching: what steps, what it holds, how long training is, and which processes take part in it ----------


@runtime_checkable
class _Stepping(Protocol):
    """Anything that steps, such as an optimizer of another library."""

    def step(self) -> object: ...


def find_optimizer(candidate: object, tuners: Sequence[Tuner]) -> Optimizer | None:
    """Return the torch optimizer inside wrappers such as accelerate's; None, with a warning, for one without hooks.

    If a method needs steps, that is rejected, and a wrapper with a state of its own, such as Lookahead, too: it would
    restore pruned weights, in their old shapes.
    """
    needing = [tuner.name for tuner in tuners if injection.needs_steps(tuner)]
    while isinstance(inner := getattr(candidate, "optimizer", None), Optimizer):
        if needing and getattr(candidate, "state", inner.state) is not inner.state:
            wrapper, wrapped = type(candidate).__name__, type(inner).__name__
            raise StepError(
                f"{wrapper} keeps its own state in addition to that of {wrapped}, and may restore weights that adapter "
                f"{needing[0]!r} pruned; train it with {wrapped} alone, or use a method that needs no steps"
            )
        candidate = inner
    if isinstance(candidate, Optimizer):
        with suppress(AttributeError):
            candidate.register_state_dict_post_hook(lambda *_: None).remove()
            return candidate
    name = type(candidate).__name__
    if isinstance(candidate, type) or not isinstance(candidate, _Stepping):
        raise StepError(
            f"attach takes a torch optimizer, or a trainer that an installed plugin knows, got {name}; "
            f"{hooks.unserved(candidate) or 'pass the optimizer that steps the adapter'}"
        )
    if needing:
        raise StepError(
            f"{name} does not support hooks: it does not call torch.optim.Optimizer.__init__. If it wraps an optimizer "
            "that does, attach that one; otherwise attach another optimizer"
        )
    warn(
        f"{name} does not support hooks, so steps are not counted; nothing else is lost, because no method here needs "
        "them"
    )
    return None


def check_attachable(tuner: Tuner, optimizer: Optimizer | None) -> None:
    """Raise an error if ``tuner`` is attached or cannot be trained now, or if ``optimizer`` holds none of it."""
    if is_attached(tuner):
        others = [name for name, other in injection.wrapped_of(tuner.model).tuners.items() if not is_attached(other)]
        which = f", or pass adapter={others[0]!r} to attach another" if others else ""
        raise StepError(
            f"adapter {tuner.name!r} is attached already: one optimizer drives it. To go on with another one, first "
            "delete the earlier one and what holds it, such as its scheduler; or call "
            f"tunerkit.delete(model, {tuner.name!r}) and wrap again for a new run{which}"
        )
    if injection.is_frozen(tuner):
        raise StepError(
            f"adapter {tuner.name!r} is frozen; tunerkit.thaw(model, {tuner.name!r}) resumes training it, and "
            "tunerkit.load(..., trainable=True) loads an adapter for training"
        )
    if any(p.is_meta for p in tuner.parameters()):
        raise StepError(
            f"adapter {tuner.name!r} is on the meta device and cannot be trained: accelerate offloads it with the "
            "model. Offload first, then wrap: the adapter then stays on the device where the model runs"
        )
    injection.refuse_fixed(tuner.model, "attaching")
    injection.refuse_lost([tuner])
    if optimizer is not None:
        _check_held(tuner, optimizer)


def _check_held(tuner: Tuner, optimizer: Optimizer) -> None:
    """Reject an optimizer that holds no parameter of the adapter; warn about one that holds only some of them."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = {path: {n: p for n, p in slot.named_parameters() if p.requires_grad} for path, slot in slots_in(tuner)}
    # Allocations depend on how the adapters themselves are trained, so a head that is trained in full does not count.
    adapters = tuner.adapters() if injection.needs_steps(tuner) else trained
    counted = [own for path, own in trained.items() if own and path in adapters]
    if counted and not any(id(p) in held for own in counted for p in own.values()):
        raise StepError(
            f"the optimizer holds none of the parameters of adapter {tuner.name!r} at its {len(counted)} places; "
            f"{_BUILD_IT}, or pass adapter=... to name the adapter that it trains"
        )
    for group in optimizer.param_groups if type(optimizer).__module__.startswith("torch.") else ():
        eps, half = group.get("eps"), [p for p in group["params"] if p.dtype == torch.float16]
        if half and type(eps) is float and not torch.tensor(eps).half():
            warn(
                f"{len(half)} trained parameters are in float16, in which the optimizer's eps={eps:g} is 0: its steps "
                "divide by 0, and weights become NaN. Set adapter_dtype to float32, and load a base whose modules or "
                "biases are trained in bfloat16 or float32; or give the optimizer eps=1e-4"
            )
    missing: dict[str, list[str]] = defaultdict(list)  # the places by what is missing there
    for path, own in trained.items():
        if names := ", ".join(name for name, p in own.items() if id(p) not in held):
            missing[names].append(path)
    if missing:
        listed = "; ".join(f"{names} at {few(paths, shown=5)}" for names, paths in missing.items())
        warn(
            f"the optimizer does not hold all parameters that adapter {tuner.name!r} trains. Unless another optimizer "
            f"trains them, these do not change: {listed}; {_BUILD_IT}"
        )


def agree_on_total(tuner: Tuner, total_steps: SupportsIndex | None) -> int | None:
    """Return the total steps of the call or the config. They must agree; a method that needs steps requires one."""
    configured = tuner.config.total_steps
    total = configured if total_steps is None else total_steps
    if configured is not None and total != configured:
        raise StepError(
            f"adapter {tuner.name!r}: the config says total_steps={configured}, training has {total_steps}; "
            "make them equal or leave the config's out"
        )
    if total is None:
        if injection.needs_steps(tuner):
            raise StepError(
                f"method {tuner.method!r} needs the length of training: pass total_steps=... to tunerkit.attach, "
                "or set total_steps in the config"
            )
        return None
    try:
        count = 0 if isinstance(total, bool) else operator.index(total)  # numpy's integers are accepted too
    except TypeError:
        count = 0
    if not 1 <= count < 2**63:
        raise StepError(f"total_steps: expected a number of optimizer steps from 1 to 2**63 - 1, got {shown(total)}")
    return count


def engine_for(
    tuners: Sequence[Tuner], model: nn.Module, candidate: object, data_parallel: bool | None
) -> tuple[Engine, object]:
    """Return the engine of a training, and the optimizer with the step hooks: ``candidate``, or one around it.

    ``model`` is the model that runs, which may contain the wrapped one. Raises `StepError` in a process group for which
    no plugin has an engine.
    """
    if data_parallel not in (None, False, True):
        raise StepError(f"data_parallel: expected True, False or None, got {shown(data_parallel)}")
    found = hooks.first(
        hooks.specs.tunerkit_engine, tuners=tuners, model=model, candidate=candidate, data_parallel=data_parallel
    )
    if found is not None:
        return found
    # A process group of one process counts too, since there may be DDP around it; or a launcher says so.
    is_one_of_several = hooks.in_group() or os.environ.get("WORLD_SIZE", "1") not in ("", "1")
    if data_parallel or (data_parallel is None and is_one_of_several):
        lacking = hooks.registry.lacking("synchronizes them")
        raise StepError(
            "this process is one of a group, or has to be, and no installed plugin keeps the adapters of a group "
            f"alike, so each process would train its own in silence. {f'{lacking}. ' if lacking else ''}If they are "
            "meant to be apart, attach with data_parallel=False"
        )
    return Engine(), candidate


# --- An adapter that an optimizer moves and does not drive ------------------------------------------------------------


@attrs.define(eq=False)
class LastGradient:
    """The most recent gradient of an adapter that no driven step has used."""

    parameter: nn.Parameter | None = None  # no weak reference: torch converts no parameter that has one
    version: int | None = None  # torch's count of the changes of its values at the gradient; None without one
    # Its values at the gradient, if nothing drives the adapter: torch counts no changes by fused optimizers.
    values: Tensor | None = None
    is_reported: bool = False

    def __reduce__(self) -> tuple[type["LastGradient"], tuple[()]]:
        return LastGradient, ()  # a copy or a pickle of the model starts anew

    def was_used(self) -> bool:
        """Whether the values have changed since."""
        if self.parameter is None or self.version is None:
            return False
        if self.version != torch_private.version(self.parameter):
            return True
        before, now = self.values, self.parameter.detach()
        if before is None or (before.dtype, before.device) != (now.dtype, now.device):
            return False
        return not torch.equal(before.nan_to_num(), now.nan_to_num())


def watch_(tuner: Tuner) -> LastGradient:
    """Let the model of an adapter look for undriven steps from now on, if the adapter's method acts on steps."""
    last: LastGradient = tuner.progress.last or LastGradient()
    last.version = None
    if hooks.watches_steps(tuner.method):
        tuner.progress.last, model = last, tuner.model
        if not torch_private.has_hook(model, look):
            model.register_forward_pre_hook(look)
            model.register_load_state_dict_pre_hook(forget)
        _follow_(tuner, last)
    return last


def unwatch_(model: nn.Module) -> None:
    """Undo `watch_` if no adapter of the model is watched any more."""
    if all(tuner.progress.last is None for tuner in injection.wrapped_of(model).tuners.values()):
        torch_private.remove_hooks_(model, look)
        torch_private.remove_state_hooks_(model, forget)


def forget(model: nn.Module, *state: object) -> None:
    """Expect other values, which are about to be loaded: a hook before ``load_state_dict``."""
    for tuner in injection.wrapped_of(model).tuners.values():
        if tuner.progress.last is not None:
            tuner.progress.last.version = None


def look(model: nn.Module, args: Any) -> None:
    """Look for adapters that were moved and not driven, before a forward of the wrapped model: its pre-hook."""
    # Not under compile: compiled code must not have a Python side effect in each call.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    for tuner in injection.wrapped_of(model).tuners.values():
        last: LastGradient | None = tuner.progress.last
        if last is not None and not last.is_reported:
            report_undriven(tuner)
            _follow_(tuner, last)


def _follow_(tuner: Tuner, last: LastGradient) -> None:
    """Note the gradients of the parameter that is trained now. Shrinking and engines replace parameters."""
    slots = (injection.slots_of(target.module) for target in tuner.targets)
    found = (each.get(tuner.name) for each in slots if each is not None)
    # Of the method's own adapters: one may train a new head alone before.
    adapters = (slot.adapter for slot in found if slot is not None and slot.adapter is not None)
    own = next((p for adapter in adapters for p in adapter.parameters() if p.requires_grad), None)
    if own is not None and last.parameter is not own:
        last.parameter, last.version, last.values = own, None, None
        own.register_post_accumulate_grad_hook(functools.partial(_note, ref(tuner)))


def _note(watched: "ref[Tuner]", parameter: Tensor) -> None:
    """Look, as a loop may never call the model itself, and note that ``parameter`` has a gradient: its hook then."""
    tuner = watched()
    if tuner is None or injection.wrapped_of(tuner.model).tuners.get(tuner.name) is not tuner:
        return  # it was taken out
    last: LastGradient | None = tuner.progress.last
    if last is not None and last.parameter is parameter and not last.is_reported:
        report_undriven(tuner)
        last.version = torch_private.version(parameter)
        last.values = None if is_attached(tuner) else parameter.detach().clone()


def report_undriven(tuner: Tuner, *, saving: bool = False) -> None:
    """Raise `StepError`, or warn, if an optimizer that does not drive an adapter has moved it.

    A method that needs steps stops if nothing drives it: it could never be saved. If other adapters of the model are
    attached, somebody chose these, and may attach this one later. Then, and before saving, a warning is enough.
    """
    last: LastGradient | None = tuner.progress.last
    if last is None or last.is_reported or not last.was_used():
        return
    last.version = last.values = None
    others = injection.wrapped_of(tuner.model).tuners.values()
    lost = "A deep-copied optimizer has lost its hooks, and a deep-copied model must be attached itself"
    if injection.needs_steps(tuner) and not saving and not any(map(is_attached, others)):
        raise StepError(
            f"an optimizer steps adapter {tuner.name!r}, but nothing drives it: method {tuner.method!r} would not see "
            "these steps, and the adapter could not be saved. Before training, call tunerkit.attach(model, optimizer, "
            f"total_steps=...), or with a Trainer tunerkit.attach(model, trainer). {lost}; to train without this "
            f"adapter, call tunerkit.freeze(model, {tuner.name!r})"
        )
    last.is_reported = True
    driver = "another optimizer drives it" if is_attached(tuner) else "nothing drives it"
    warn(
        f"an optimizer steps adapter {tuner.name!r}, but {driver}: method {tuner.method!r} does not see these steps. "
        f"Call tunerkit.attach with this optimizer. {lost}"
    )
