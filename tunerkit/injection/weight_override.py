"""Temporary weight overrides: while a module reads a weight past its layer's forward, the adapted one stands there."""

import threading
from collections.abc import Iterable, Iterator
from typing import Any

import attrs
import torch
from torch import nn

from tunerkit.errors import AdapterError
from tunerkit.injection.delta import adapted_tensors
from tunerkit.injection.slots import Slots, apply_slots, base_modules, slots_of
from tunerkit.libraries import torch_private

# The attribute of a module that runs now, with what is overridden for it, and the model's with the modules that may.
_OVERRIDES = "_tunerkit_overrides"
_OWNERS = "_tunerkit_owners"


@attrs.frozen(eq=False)
class _Overrides:
    """What is overridden for one owner: by the thread that runs it, for each call that has not ended.

    A call notes what was an attribute of the instance before, by module and name; None for nothing.
    """

    thread: int
    calls: list[list[tuple[nn.Module, str, object]]] = attrs.Factory(list)


def override_in_(model: nn.Module, readers: Iterable[nn.Module | None]) -> None:
    """Let ``readers``, which use weights of adapted modules directly, and encoders around adapted modules override."""
    encoders = (module for _, module in base_modules(model) if isinstance(module, nn.TransformerEncoder))
    for module in (*readers, *filter(_may_override, encoders)):
        if module is not None and not torch_private.has_hook(module, override):
            module.register_forward_pre_hook(override)
            module.register_forward_hook(restore, always_call=True, prepend=True)
            _set_owners_(model, (*_owners(model), module))


def is_overridden(model: nn.Module, module: nn.Module) -> bool:
    """Whether a module of ``model`` that reads the weights of ``module`` gets what adapters make of them."""
    return any(read is module for owner in _owners(model) for read, _ in _read_modules(owner))


def forget_idle_(model: nn.Module) -> None:
    """Remove the hooks from modules that have nothing left to override."""
    for owner in _owners(model):
        if not _may_override(owner):
            _restore_all_(owner)
            torch_private.remove_hooks_(owner, override, restore)
    _set_owners_(model, _owners(model))


def _owners(model: nn.Module) -> tuple[nn.Module, ...]:
    return tuple(owner for owner in vars(model).get(_OWNERS, ()) if torch_private.has_hook(owner, override))


def _set_owners_(model: nn.Module, owners: tuple[nn.Module, ...]) -> None:
    """Let ``model`` itself restore at each call what an earlier one left overridden for ``owners``."""
    torch_private.remove_hooks_(model, restore_abandoned)
    vars(model)[_OWNERS] = owners
    if owners:
        model.register_forward_pre_hook(restore_abandoned, prepend=True)
    else:
        del vars(model)[_OWNERS]


def override(owner: nn.Module, args: Any) -> None:
    """The forward pre-hook of every module that reads weights past a forward.

    What overrides a parameter shadows it as an attribute of the instance: ``parameters()`` and ``state_dict()`` do not
    change, and the parameter is back as soon as the attribute is gone.
    """
    if _overrides_now(owner) or _OVERRIDES in vars(owner):
        torch_private.uncompiled(_override)(owner)


def restore(owner: nn.Module, args: Any, output: Any) -> None:
    """The forward hook beside `override`, called after an exception too, without an output."""
    if _OVERRIDES in vars(owner):
        torch_private.uncompiled(_restore)(owner)
    elif output is not None and _overrides_now(owner):
        raise AdapterError(
            f"{type(owner).__name__} was running when the whole model was called again, and its adapters were taken "
            "for those of an interrupted call: they had no effect. Do not call a model from a hook inside it"
        )


def restore_abandoned(model: nn.Module, args: Any) -> None:
    """The forward pre-hook of the model itself: restore what an interrupted call has left overridden.

    No forward hook sees a KeyboardInterrupt, so the call that it ended never restored anything. Such a call looks like
    one that is still running and calls its owner again: nothing short of the interpreter's frames tells them apart,
    and a traceback that somebody keeps, as an except block does, keeps everything that the call owned alive. So both
    are treated alike at first: a call overrides afresh and restores what it found, which is right for either. They
    part when the model is called, since calls inside a module end before it does: what is open in this thread then
    was abandoned. A hook inside an owner that calls the whole model would refute that, and `restore` raises.
    """
    for owner in vars(model)[_OWNERS]:
        if _OVERRIDES in vars(owner):
            torch_private.uncompiled(_restore_own_)(owner)


def _override(owner: nn.Module) -> None:
    before = _begin_call_(owner)
    for module, name, value in _changes(owner):
        before.append((module, name, vars(module).get(name)))
        _shadow_(module, name, value)


def _begin_call_(owner: nn.Module) -> list[tuple[nn.Module, str, object]]:
    """Note that ``owner`` starts to run. Raises `AdapterError` if it is running in another thread."""
    thread = threading.current_thread().ident  # not get_ident: a thread of C++ is listed once it has asked this
    assert thread is not None
    while True:
        # One operation on a dict: of two threads that begin at once, one is told of the other.
        found: _Overrides = vars(owner).setdefault(_OVERRIDES, _Overrides(thread))
        if found.thread == thread:
            found.calls.append([])
            return found.calls[-1]
        if any(other.ident == found.thread for other in threading.enumerate()):
            raise AdapterError(
                f"{type(owner).__name__} runs in two threads at once, and its weights are overridden for one call at a "
                "time; call tunerkit.merge before serving a model from several threads"
            )
        _restore_all_(owner)  # that thread died inside the call


def _restore(owner: nn.Module) -> None:
    """Undo the last `_override`, unless that was another thread's: the one that asks was refused."""
    found: _Overrides = vars(owner)[_OVERRIDES]
    if found.thread != threading.get_ident():
        return
    for module, name, before in reversed(found.calls.pop()):
        _shadow_(module, name, before)
    if not found.calls:
        del vars(owner)[_OVERRIDES]


def _restore_own_(owner: nn.Module) -> None:
    """Undo every `_override` of ``owner`` that this thread made."""
    if vars(owner)[_OVERRIDES].thread == threading.get_ident():
        _restore_all_(owner)


def _restore_all_(owner: nn.Module) -> None:
    """Undo every `_override` of ``owner``, whichever thread made it."""
    found: _Overrides | None = vars(owner).pop(_OVERRIDES, None)
    for module, name, before in reversed([change for call in found.calls for change in call] if found else []):
        _shadow_(module, name, before)


def _shadow_(module: nn.Module, name: str, value: object) -> None:
    if value is None:
        vars(module).pop(name, None)
    else:
        vars(module)[name] = value


def _read_modules(owner: nn.Module) -> Iterator[tuple[nn.Module, Slots]]:
    """The adapted modules whose weights the forward of ``owner`` reads: those without a hook of their own.

    Who reads what is settled when the hooks are put in: a forward may be replaced afterwards, as accelerate does.
    """
    for module in (owner, *owner.children()):
        slots = slots_of(module)
        if slots is not None and slots.base is not None and not torch_private.has_hook(module, apply_slots):
            yield module, slots


def _overrides_now(owner: nn.Module) -> bool:
    if isinstance(owner, nn.TransformerEncoder):
        return torch.is_grad_enabled() and not owner.training and owner.use_nested_tensor
    return any(slots.enabled and slots.active and not slots.merged for _, slots in _read_modules(owner))


def _may_override(module: nn.Module) -> bool:
    if isinstance(module, nn.TransformerEncoder):
        return any(slots_of(inside) is not None for inside in module.modules())
    return any(True for _ in _read_modules(module))


def _changes(owner: nn.Module) -> Iterator[tuple[nn.Module, str, object]]:
    """What stands in place of what while ``owner`` runs; None for nothing."""
    if isinstance(owner, nn.TransformerEncoder) and _overrides_now(owner):
        # A frozen base in eval mode makes its forward pack padded batches into nested tensors, which attention takes
        # only where no gradient is asked for; it looks at the base's weights to know that, and not at adapters.
        yield owner, "use_nested_tensor", False
    for module, slots in _read_modules(owner):
        assert slots.base is not None
        shown = slots.enabled and not slots.merged
        tensors = adapted_tensors(type(module).__name__, module, slots) if shown else {}
        for name in (slots.base.weight_name, slots.base.bias_name):
            yield module, name, tensors.get(name)
