"""Whether an optimizer drives an adapter, and what is said if another one, or none, turns out to step it.

A forgotten `attach` would let a whole training go wrong without a word. So a wrapped model looks at its adapters before
each forward, and an adapter in each backward: if its values changed since its last gradient, an optimizer moved them.
"""

import functools
from typing import Any
from weakref import WeakKeyDictionary, ref

import attrs
import torch
from torch import Tensor, nn

from tunerkit import hooks, injection
from tunerkit.errors import StepError, warn
from tunerkit.hooks import Removable
from tunerkit.injection import Tuner
from tunerkit.layers import torch_private


def is_attached(tuner: Tuner) -> bool:
    """Whether an optimizer currently drives ``tuner``."""
    link = tuner.progress.link
    return link is not None and bool(link.handles) and link.optimizer() is not None


def hold(tuner: Tuner, *handles: Removable) -> None:
    """Store more hook handles of the optimizer that drives ``tuner``; `detach` removes them."""
    link = tuner.progress.link
    assert link is not None
    tuner.progress.link = attrs.evolve(link, handles=(*link.handles, *handles))


def detach(tuner: Tuner) -> None:
    """Undo `attach`. If ``tuner`` is not attached, nothing happens."""
    link = tuner.progress.link
    if link is not None:
        for handle in link.handles:
            handle.remove()
        tuner.progress.link = attrs.evolve(link, handles=())


@attrs.define(eq=False)
class LastGradient:
    """The last gradient of one parameter of an adapter that nobody has accounted for.

    Attributes:
        parameter: The parameter. No weak reference: torch converts no parameter that has one.
        version: Torch's count of the changes of its values when it had the gradient; None if it had none, or if the
            optimizer that drives the adapter has stepped since, or values were loaded.
        values: A copy of its values then, if nothing drove the adapter: fused optimizers do not count.
        is_reported: Whether nothing more is said of the adapter: a warning has, or its method does not act on steps.
    """

    parameter: nn.Parameter | None = None
    version: int | None = None
    values: Tensor | None = None
    is_reported: bool = False

    @property
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


class _LastGradients(WeakKeyDictionary[Tuner, LastGradient]):
    """Those of the adapters of one model whose methods act on steps. A copy or a pickle of the model starts anew."""

    def __reduce__(self) -> tuple[type["_LastGradients"], tuple[()]]:
        return type(self), ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "_LastGradients":
        return type(self)()


_ATTRIBUTE = "_tunerkit_gradients"


def watch_(tuner: Tuner) -> None:
    """Let the model of an adapter look for undriven steps from now on, if the adapter's method acts on steps."""
    held = vars(tuner.model)
    if not hooks.watches_steps(tuner.method):
        return
    if _ATTRIBUTE not in held:
        held[_ATTRIBUTE] = _LastGradients()
        tuner.model.register_forward_pre_hook(look)
        tuner.model.register_load_state_dict_pre_hook(forget)
    if (last := last_gradient(tuner)) is not None:
        last.version = None
        _follow_(tuner, last)


def unwatch_(model: nn.Module) -> None:
    """Undo `watch_` if the model has no adapter any more."""
    if not injection.wrapped_of(model).tuners:
        torch_private.remove_hooks_(model, look)
        torch_private.remove_state_hooks_(model, forget)
        vars(model).pop(_ATTRIBUTE, None)


def forget(model: nn.Module, *state: object) -> None:
    """Expect other values, which are about to be loaded: a hook before ``load_state_dict``."""
    for last in vars(model).get(_ATTRIBUTE, {}).values():
        last.version = None


def last_gradient(tuner: Tuner) -> LastGradient | None:
    """Return the record of an adapter's gradients; None if no adapter of its model is watched."""
    found: _LastGradients | None = vars(tuner.model).get(_ATTRIBUTE)
    if found is not None and tuner not in found:
        found[tuner] = LastGradient(is_reported=not hooks.watches_steps(tuner.method))
    return None if found is None else found[tuner]


def look(model: nn.Module, args: Any) -> None:
    """Look for adapters that were moved and not driven, before a forward of the wrapped model: its pre-hook."""
    # Not under compile: compiled code must not have a Python side effect in each call.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    for tuner in injection.wrapped_of(model).tuners.values():
        last = last_gradient(tuner)
        if last is not None and not last.is_reported:
            report_undriven(tuner, last)
            _follow_(tuner, last)


def _follow_(tuner: Tuner, last: LastGradient) -> None:
    """Note the gradients of the parameter that is trained now. Shrinking and engines replace parameters."""
    own = _trained(tuner)
    if own is not None and last.parameter is not own:
        last.parameter, last.version, last.values = own, None, None
        own.register_post_accumulate_grad_hook(functools.partial(_note, ref(tuner), ref(last)))


def _note(tuner: "ref[Tuner]", last: "ref[LastGradient]", parameter: Tensor) -> None:
    """Look, as a loop may never call the model itself, and note that ``parameter`` has a gradient: its hook then."""
    adapter, found = tuner(), last()
    if adapter is None or found is None or found.is_reported or found.parameter is not parameter:
        return
    if injection.wrapped_of(adapter.model).tuners.get(adapter.name) is not adapter:
        return  # it was taken out
    report_undriven(adapter, found)
    found.version = torch_private.version(parameter)
    found.values = None if is_attached(adapter) else parameter.detach().clone()


def _trained(tuner: Tuner) -> nn.Parameter | None:
    """The first trained parameter of the method's own adapters: one may train a new head alone before."""
    for target in tuner.targets:
        slots = injection.slots_of(target.module)
        slot = None if slots is None else slots.get(tuner.name)
        if slot is not None and slot.adapter is not None:
            for parameter in slot.adapter.parameters():
                if parameter.requires_grad:
                    return parameter
    return None


def report_undriven(tuner: Tuner, last: LastGradient | None, *, saving: bool = False) -> None:
    """Raise `StepError`, or warn, if an optimizer that does not drive an adapter has moved it.

    A method that needs steps stops if nothing drives it: it could never be saved. If other adapters of the model are
    attached, somebody chose these, and may attach this one later: then there is a warning.

    Args:
        tuner: The adapter's handle.
        last: Its last gradient, from `last_gradient`.
        saving: Whether it is about to be saved; a warning is enough then.
    """
    if last is None or last.is_reported or not last.was_used:
        return
    last.version = last.values = None
    others = injection.wrapped_of(tuner.model).tuners.values()
    if injection.needs_steps(tuner) and not saving and not any(map(is_attached, others)):
        raise StepError(
            f"an optimizer steps adapter {tuner.name!r}, but nothing drives it: method {tuner.method!r} would not see "
            "these steps, and the adapter could not be saved. Before training, call tunerkit.attach(model, optimizer, "
            "total_steps=...), or with a Trainer tunerkit.attach(model, trainer). A deep-copied optimizer has lost its "
            "hooks, and a deep-copied model must be attached itself; to train without this adapter, call "
            f"tunerkit.freeze(model, {tuner.name!r})"
        )
    last.is_reported = True
    driver = "another optimizer drives it" if is_attached(tuner) else "nothing drives it"
    warn(
        f"an optimizer steps adapter {tuner.name!r}, but {driver}: method {tuner.method!r} does not see these steps. "
        "Call tunerkit.attach with this optimizer. A deep-copied optimizer has lost its hooks, and a deep-copied model "
        "must be attached itself"
    )
