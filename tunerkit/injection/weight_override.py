"""Temporary weight overrides, for modules ("owners") that use a child's weight directly, bypassing its forward."""

import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import attrs
import torch
from torch import nn

from tunerkit.errors import AdapterError
from tunerkit.injection.delta import adapted_tensors
from tunerkit.injection.slots import Slots, base_modules, is_called, slots_of, walk
from tunerkit.layers import torch_private

# The attribute of a running owner for its `_Calls`.
_CALLS = "_tunerkit_overrides"


@attrs.frozen(eq=False)
class _Calls:
    """The running calls of an owner in one thread, the outermost first.

    ``replaced`` lists, for each call, the overridden attributes as (module, attribute, earlier value or None).
    """

    thread: int | None
    replaced: list[list[tuple[nn.Module, str, object]]] = attrs.field(factory=list)


def override_in_(owners: Iterable[nn.Module]) -> None:
    """Register override hooks on each owner that uses an adapted weight directly, or is an encoder with adapters."""
    for owner in filter(_may_override, owners):
        if not torch_private.has_hook(owner, override):
            owner.register_forward_pre_hook(override)
            owner.register_forward_hook(restore, always_call=True, prepend=True)


def drop_overrides_(model: nn.Module) -> None:
    """Remove the override hooks from owners that have no weights left to override."""
    for owner in _owners(module for _, module in base_modules(model)):
        if not _may_override(owner):
            while _CALLS in vars(owner):
                _undo_(owner)
            torch_private.remove_hooks_(owner, override, restore)


def overridden_in(modules: Iterable[nn.Module]) -> set[int]:
    """Return the ids of the modules whose weights an owner among ``modules`` overrides."""
    return {id(module) for owner in _owners(modules) for module, _ in _read_modules(owner)}


def _owners(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return [module for module in modules if torch_private.has_hook(module, override)]


def override(owner: nn.Module, args: Any) -> None:
    """Forward pre-hook of an owner: override the weights that it uses directly.

    The adapted weight becomes an instance attribute of the module, which hides the parameter. ``parameters()`` and
    ``state_dict()`` do not change. Removing the attribute makes the parameter visible again.
    """
    if _overrides_now(owner) or _CALLS in vars(owner):
        torch_private.uncompiled(_override)(owner)


def restore(owner: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of an owner, also called after an exception: undo `override`.

    Does nothing if another thread runs the owner: this thread's call was rejected before it overrode anything.
    """
    calls: _Calls | None = vars(owner).get(_CALLS)
    if calls is not None and calls.thread == threading.get_ident():
        torch_private.uncompiled(_undo_)(owner)


def _override(owner: nn.Module) -> None:
    here = threading.current_thread().ident  # not get_ident: this also registers threads that C++ started
    # setdefault is atomic: of two threads that begin at once, one sees the other's record.
    while (calls := vars(owner).setdefault(_CALLS, _Calls(here))).thread != here or _has_abandoned(owner, calls):
        if calls.thread != here and any(other.ident == calls.thread for other in threading.enumerate()):
            raise AdapterError(
                f"{type(owner).__name__} runs in two threads at once, but its weights can be overridden for only one "
                "call at a time; call tunerkit.merge before serving a model from several threads"
            )
        _undo_(owner)
    calls.replaced.append([])
    for module, name, value in _changes(owner):
        calls.replaced[-1].append((module, name, vars(module).get(name)))
        _set_(module, name, value)


def _has_abandoned(owner: nn.Module, calls: _Calls) -> bool:
    """Whether an earlier call ended without `restore`, as after a KeyboardInterrupt, which skips forward hooks."""
    if not calls.replaced:
        return False
    running = sum(module is owner for module in torch_private.called_in(sys._getframe()))
    return len(calls.replaced) >= max(running, 1)  # compiled code may hide this one


def _undo_(owner: nn.Module) -> None:
    """Undo the overrides of the innermost call of ``owner``. After an interrupt, this function may be repeated."""
    calls: _Calls | None = vars(owner).get(_CALLS)
    if calls is not None:
        for module, name, value in reversed(calls.replaced[-1] if calls.replaced else []):
            _set_(module, name, value)
        if len(calls.replaced) > 1:
            calls.replaced.pop()
        else:
            vars(owner).pop(_CALLS, None)


def _set_(module: nn.Module, name: str, value: object) -> None:
    """Set an instance attribute of ``module``; a value of None removes the attribute."""
    if value is None:
        vars(module).pop(name, None)
    else:
        vars(module)[name] = value


def _read_modules(owner: nn.Module) -> Iterator[tuple[nn.Module, Slots]]:
    """Yield (module, slots) for the adapted modules whose weights ``owner`` uses directly: they have no forward hook.

    The hook is checked rather than the forward, since a library such as accelerate may replace the forward later.
    """
    for module in (owner, *owner.children()):
        slots = slots_of(module)
        if slots is not None and slots.base is not None and not is_called(module):
            yield module, slots


def _overrides_now(owner: nn.Module) -> bool:
    if isinstance(owner, nn.TransformerEncoder):
        return torch.is_grad_enabled() and not owner.training and owner.use_nested_tensor
    return any(slots.enabled and slots.active and not slots.merged for _, slots in _read_modules(owner))


def _may_override(module: nn.Module) -> bool:
    return any(walk(module) if isinstance(module, nn.TransformerEncoder) else _read_modules(module))


def _changes(owner: nn.Module) -> Iterator[tuple[nn.Module, str, object]]:
    """Yield (module, attribute, value) for each override of ``owner``; None stands for the module's own value."""
    if isinstance(owner, nn.TransformerEncoder) and _overrides_now(owner):
        # With a frozen base in eval mode, the encoder packs padded batches into nested tensors, which attention accepts
        # only without gradients. The encoder's check looks at the base's weights and not at adapters.
        yield owner, "use_nested_tensor", False
    for module, slots in _read_modules(owner):
        assert slots.base is not None
        shown = slots.enabled and not slots.merged
        tensors = adapted_tensors(type(module).__name__, module, slots) if shown else {}
        for name in (slots.base.weight_name, slots.base.bias_name):
            yield module, name, tensors.get(name)
