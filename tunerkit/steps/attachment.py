"""Check an optimizer before it is attached, and detect optimizers that update an adapter without being attached.

Without `attach`, training silently gives a wrong result. So hooks check an adapter before each forward of the model and
in each backward: if its values changed after the last gradient, an optimizer has updated them.
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
from tunerkit.layers import torch_private, weights
from tunerkit.paths import few

_BUILD_IT = "build it from (p for p in model.parameters() if p.requires_grad) after tunerkit.wrap"


def is_attached(tuner: Tuner) -> bool:
    """Whether an optimizer currently drives ``tuner``."""
    link = tuner.progress.link
    return link is not None and bool(link.handles) and link.optimizer() is not None


def hold(tuner: Tuner, *handles: Removable) -> None:
    """Store handles of hooks on the optimizer that drives ``tuner``; `detach` removes the hooks."""
    link = tuner.progress.link
    assert link is not None
    link.handles.extend(handles)


def detach(tuner: Tuner) -> None:
    """Undo `attach`; does nothing if ``tuner`` is not attached."""
    if (link := tuner.progress.link) is not None:
        for handle in link.handles:
            handle.remove()
        link.handles.clear()


# --- Before attaching: the optimizer, its parameters, the length of training, and the processes ----------------------


@runtime_checkable
class _Stepping(Protocol):
    """An object with a ``step`` method, such as another library's optimizer."""

    def step(self) -> object: ...


def find_optimizer(candidate: object, tuners: Sequence[Tuner]) -> Optimizer | None:
    """Return the torch optimizer inside wrappers such as accelerate's; warn and return None if it has no hooks.

    If a method needs steps, raises `StepError` for an optimizer without hooks, and for a wrapper with its own state,
    such as Lookahead, which would restore pruned weights in their old shapes.
    """
    needing = [tuner.name for tuner in tuners if injection.needs_steps(tuner)]
    while isinstance(inner := getattr(candidate, "optimizer", None), Optimizer):
        if needing and getattr(candidate, "state", inner.state) is not inner.state:
            wrapper, wrapped = type(candidate).__name__, type(inner).__name__
            raise StepError(
                f"{wrapper} keeps its own state beside the state of {wrapped}, and may restore weights that adapter "
                f"{needing[0]!r} pruned; train with {wrapped} alone, or use a method that needs no steps"
            )
        candidate = inner
    if isinstance(candidate, Optimizer):
        with suppress(AttributeError):
            candidate.register_state_dict_post_hook(lambda *_: None).remove()
            return candidate
    name = type(candidate).__name__
    if isinstance(candidate, type) or not isinstance(candidate, _Stepping):
        raise StepError(
            f"attach takes a torch optimizer, or a trainer that an installed plugin supports, got {name}; "
            f"{hooks.unserved(candidate) or 'pass the optimizer that steps the adapter'}"
        )
    if needing:
        raise StepError(
            f"{name} does not support hooks: it does not call torch.optim.Optimizer.__init__. If it wraps an optimizer "
            "with hooks, attach the wrapped optimizer; otherwise use another optimizer"
        )
    warn(
        f"{name} does not support hooks, so steps are not counted; nothing else is lost, because no adapter's method "
        "needs steps"
    )
    return None


def check_attachable(tuner: Tuner, optimizer: Optimizer | None) -> None:
    """Raise an error if ``tuner`` is attached, cannot be trained now, or has no parameter in ``optimizer``."""
    if is_attached(tuner):
        others = [name for name, other in injection.wrapped_of(tuner.model).tuners.items() if not is_attached(other)]
        which = f", or pass adapter={others[0]!r} to attach another" if others else ""
        raise StepError(
            f"adapter {tuner.name!r} is attached to an optimizer already. To continue with another optimizer, first "
            "delete the old one and all references to it, such as its scheduler; or call "
            f"tunerkit.delete(model, {tuner.name!r}) and wrap again for a new run{which}"
        )
    if injection.is_frozen(tuner):
        raise StepError(
            f"adapter {tuner.name!r} is frozen; tunerkit.thaw(model, {tuner.name!r}) resumes training it, and "
            "tunerkit.load(..., trainable=True) loads an adapter for training"
        )
    if any(p.is_meta for p in tuner.parameters()):
        raise StepError(
            f"adapter {tuner.name!r} is on the meta device and cannot be trained: accelerate has offloaded it with the "
            "model. Offload first, then wrap: the adapter then stays on the device where the model runs"
        )
    injection.refuse_fixed(tuner.model, "attaching")
    injection.refuse_lost([tuner])
    if optimizer is not None:
        _check_held(tuner, optimizer)


def _check_held(tuner: Tuner, optimizer: Optimizer) -> None:
    """Raise `StepError` if the optimizer has none of the adapter's parameters; warn of missing ones or a tiny eps."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = {path: {n: p for n, p in slot.named_parameters() if p.requires_grad} for path, slot in slots_in(tuner)}
    # Allocations need gradients of the adapters themselves, so a head that is trained in full does not count.
    adapters = tuner.adapters() if injection.needs_steps(tuner) else trained
    counted = [own for path, own in trained.items() if own and path in adapters]
    if counted and not any(id(p) in held for own in counted for p in own.values()):
        raise StepError(
            f"the optimizer has none of the parameters of adapter {tuner.name!r}, which is in {len(counted)} modules; "
            f"{_BUILD_IT}, or pass adapter=... to name the adapter that it trains"
        )
    for group in optimizer.param_groups if type(optimizer).__module__.startswith("torch.") else ():
        eps, half = group.get("eps"), [p for p in group["params"] if p.dtype == torch.float16]
        if half and type(eps) is float and not torch.tensor(eps).half():
            warn(
                f"{len(half)} trained parameters are float16, where the optimizer's eps={eps:g} rounds to 0: steps "
                "divide by 0, and weights become NaN. Set adapter_dtype to float32; if modules or biases of the base "
                "are trained too, load the base in bfloat16 or float32. Or give the optimizer eps=1e-4"
            )
    missing: dict[str, list[str]] = defaultdict(list)  # module paths, by the names of their missing parameters
    for path, own in trained.items():
        if names := ", ".join(name for name, p in own.items() if id(p) not in held):
            missing[names].append(path)
    if missing:
        listed = "; ".join(f"{names} at {few(paths, shown=5)}" for names, paths in missing.items())
        warn(
            f"the optimizer lacks parameters that adapter {tuner.name!r} trains. Unless another optimizer trains them, "
            f"these do not change: {listed}; {_BUILD_IT}"
        )


def agree_on_total(tuner: Tuner, total_steps: SupportsIndex | None) -> int | None:
    """Return the total steps of the call or config. Raises `StepError` if they differ, or none is given but needed."""
    configured = tuner.config.total_steps
    total = configured if total_steps is None else total_steps
    if configured is not None and total != configured:
        raise StepError(
            f"adapter {tuner.name!r}: the config has total_steps={configured}, but training has {total_steps}; make "
            "them equal, or remove total_steps from the config"
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
    """Return the engine of a training, and the optimizer for the step hooks: ``candidate``, or a wrapper around it.

    ``model`` is the model that is called, which may contain the wrapped one. Raises `StepError` if no plugin provides
    an engine although one is needed: ``data_parallel`` is True, or it is None in one of several processes.
    """
    if data_parallel not in (None, False, True):
        raise StepError(f"data_parallel: expected True, False or None, got {shown(data_parallel)}")
    found = hooks.first(
        hooks.specs.tunerkit_engine, tuners=tuners, model=model, candidate=candidate, data_parallel=data_parallel
    )
    if found is not None:
        return found
    # A process group of one process counts too, since DDP may wrap the model. A launcher sets WORLD_SIZE.
    is_one_of_several = weights.in_group() or os.environ.get("WORLD_SIZE", "1") not in ("", "1")
    if data_parallel or (data_parallel is None and is_one_of_several):
        lacking = hooks.registry.lacking("synchronizes them")
        group = "this process belongs to a process group, or was started as one of several"
        raise StepError(
            f"{'data_parallel is True' if data_parallel else group}, but no installed plugin synchronizes adapters, so "
            "each process would silently train its own. "
            f"{f'{lacking}. ' if lacking else ''}To train independent adapters, attach with data_parallel=False"
        )
    return Engine(), candidate


# --- Optimizers that update an adapter without being attached ---------------------------------------------------------


@attrs.define(eq=False)
class LastGradient:
    """An adapter's most recent gradient that no step of the attached optimizer has used yet."""

    parameter: nn.Parameter | None = None  # not a weak reference, with which torch could not convert the parameter
    version: int | None = None  # torch's version counter of the parameter at the gradient; None without a gradient
    # The parameter's values at the gradient, if the adapter is not attached: fused optimizers do not count versions.
    values: Tensor | None = None
    is_reported: bool = False

    def __reduce__(self) -> tuple[type["LastGradient"], tuple[()]]:
        return LastGradient, ()  # a copy of the model starts without a gradient

    def was_used(self) -> bool:
        """Whether the parameter's values have changed after the gradient was computed."""
        if self.parameter is None or self.version is None:
            return False
        if self.version != torch_private.version(self.parameter):
            return True
        before, now = self.values, self.parameter.detach()
        if before is None or (before.dtype, before.device) != (now.dtype, now.device):
            return False
        return not torch.equal(before.nan_to_num(), now.nan_to_num())


def watch_(tuner: Tuner) -> LastGradient:
    """Register hooks that detect steps of an unattached optimizer; return the gradient record that they update."""
    last: LastGradient = tuner.progress.last or LastGradient()
    last.version = None
    tuner.progress.last, model = last, tuner.model
    if not torch_private.has_hook(model, look):
        model.register_forward_pre_hook(look)
        model.register_load_state_dict_pre_hook(forget)
    _follow_(tuner, last)
    return last


def unwatch_(model: nn.Module) -> None:
    """Remove the hooks that `watch_` registered on the model, if no adapter is watched any more."""
    if all(tuner.progress.last is None for tuner in injection.wrapped_of(model).tuners.values()):
        torch_private.remove_hooks_(model, look)
        torch_private.remove_state_hooks_(model, forget)


def forget(model: nn.Module, *state: object) -> None:
    """Hook before ``load_state_dict``: drop the last gradients, since values are about to change."""
    for tuner in injection.wrapped_of(model).tuners.values():
        if tuner.progress.last is not None:
            tuner.progress.last.version = None


def look(model: nn.Module, args: Any) -> None:
    """Forward pre-hook of the wrapped model: report adapters that an unattached optimizer has updated."""
    # Not under compile: compiled code must not have a Python side effect in each call.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    for tuner in injection.wrapped_of(model).tuners.values():
        last: LastGradient | None = tuner.progress.last
        if last is not None and not last.is_reported:
            report_undriven(tuner)
            _follow_(tuner, last)


def _follow_(tuner: Tuner, last: LastGradient) -> None:
    """Register `_note` on a currently trained parameter; called again because engines may replace parameters."""
    slots = (injection.slots_of(target.module) for target in tuner.targets)
    found = (each.get(tuner.name) for each in slots if each is not None)
    # A parameter of the method's adapters: a user may first train a new head alone.
    adapters = (slot.adapter for slot in found if slot is not None and slot.adapter is not None)
    own = next((p for adapter in adapters for p in adapter.parameters() if p.requires_grad), None)
    if own is not None and last.parameter is not own:
        last.parameter, last.version, last.values = own, None, None
        own.register_post_accumulate_grad_hook(functools.partial(_note, ref(tuner)))


def _note(watched: "ref[Tuner]", parameter: Tensor) -> None:
    """Gradient hook of ``parameter``: report an earlier step of an unattached optimizer; record the new gradient."""
    tuner = watched()
    if tuner is None or injection.wrapped_of(tuner.model).tuners.get(tuner.name) is not tuner:
        return  # the adapter was removed
    last: LastGradient | None = tuner.progress.last
    if last is not None and last.parameter is parameter and not last.is_reported:
        report_undriven(tuner)
        last.version = torch_private.version(parameter)
        last.values = None if is_attached(tuner) else parameter.detach().clone()


def report_undriven(tuner: Tuner, *, saving: bool = False) -> None:
    """Raise `StepError`, or warn, if an optimizer has updated an adapter without being attached to it.

    It raises if the method needs steps, because such an adapter cannot be saved; otherwise it warns. While saving, or
    if another adapter is attached, it always warns: the user may attach this one later.
    """
    last: LastGradient | None = tuner.progress.last
    if last is None or last.is_reported or not last.was_used():
        return
    last.version = last.values = None
    others = injection.wrapped_of(tuner.model).tuners.values()
    lost = "A deep-copied optimizer loses its hooks, and a deep-copied model must be attached again"
    if injection.needs_steps(tuner) and not saving and not any(map(is_attached, others)):
        raise StepError(
            f"an optimizer updates adapter {tuner.name!r}, but is not attached to it: method {tuner.method!r} would "
            "not run at its steps, and the adapter could not be saved. Before training, call tunerkit.attach(model, "
            f"optimizer, total_steps=...), or with a Trainer tunerkit.attach(model, trainer). {lost}; to train without "
            f"this adapter, call tunerkit.freeze(model, {tuner.name!r})"
        )
    last.is_reported = True
    other = ": another optimizer is" if is_attached(tuner) else ""
    warn(
        f"an optimizer updates adapter {tuner.name!r}, but is not attached to it{other}. Method {tuner.method!r} does "
        f"not run at its steps: call tunerkit.attach with this optimizer. {lost}"
    )
