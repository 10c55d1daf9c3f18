"""Lending: while a module runs that reads weights past a forward, what adapters make of them stands in their place."""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tunerkit.base_layers import BaseLayer
from tunerkit.deltas import add_delta, ask_delta, plugin_of
from tunerkit.errors import PluginError
from tunerkit.readers import read_children
from tunerkit.slots import Slot, Slots, slots_of
from tunerkit.survey import parent

# The attribute of a module that runs now: for each running call, what stood where something is lent.
_LOANS = "_tunerkit_loans"
_RUN = nn.Module._call_impl.__code__


def lender(model: nn.Module, path: str, base: BaseLayer | None) -> nn.Module | None:
    """The module whose forward reads the weight at ``path``, if no hook there would do; None where a hook does.

    A copy or a norm (``base`` None) is called, or replaced whole.
    """
    if base is None:
        return None
    if base.lends:
        return base.module
    owner = model.get_submodule(parent(path))
    return owner if path.rpartition(".")[2] in read_children(owner) else None


def lend_at_(model: nn.Module, path: str) -> bool:
    """Let the slots at ``path`` lend if that is how they work; whether it is."""
    slots = slots_of(model.get_submodule(path))
    owner = lender(model, path, slots.base if slots is not None else None)
    above = [model, *(model.get_submodule(path[:end]) for end, sign in enumerate(path) if sign == ".")]
    for module in (owner, *(one for one in above if isinstance(one, nn.TransformerEncoder))):
        if module is not None and lend not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(lend)
            module.register_forward_hook(give_back, always_call=True, prepend=True)
    return owner is not None


def forget_idle_(model: nn.Module) -> None:
    """Take the hooks away from modules that have nothing left to lend; found by the functions, as in ``inject``."""
    for module in model.modules():
        if lend in module._forward_pre_hooks.values() and not _may_lend(module):
            _reclaim_(module)
            for hooks, ours in ((module._forward_pre_hooks, lend), (module._forward_hooks, give_back)):
                for key in [key for key, hook in hooks.items() if hook is ours]:
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)


def lend(owner: nn.Module, args: Any) -> None:
    """The forward pre-hook of every module that reads weights past a forward.

    What is lent shadows the parameter as an attribute of the instance: ``parameters()`` and ``state_dict()`` do not
    change, and the parameter is back as soon as the attribute is gone.
    """
    loans = vars(owner).get(_LOANS, [])
    if loans and not _is_nested(owner):
        # KeyboardInterrupt passes by every hook: the call before this one was never given back.
        _reclaim_(owner)
        loans = []
    vars(owner)[_LOANS] = [*loans, []]
    for module, name, value in _loans(owner):
        vars(owner)[_LOANS][-1].append((module, name, vars(module).get(name)))
        _shadow_(module, name, value)


def give_back(owner: nn.Module, args: Any, output: Any) -> None:
    """The forward hook beside `lend`, called after an exception too."""
    *loans, last = vars(owner).pop(_LOANS, [[]])
    for module, name, before in reversed(last):
        _shadow_(module, name, before)
    if loans:
        vars(owner)[_LOANS] = loans


def _reclaim_(owner: nn.Module) -> None:
    while _LOANS in vars(owner):
        give_back(owner, None, None)


def _shadow_(module: nn.Module, name: str, value: object) -> None:
    if value is None:
        vars(module).pop(name, None)
    else:
        vars(module)[name] = value


def _is_nested(owner: nn.Module) -> bool:
    """Whether ``owner`` is running further up in this thread, apart from the call whose hook asks."""
    frame, calls = sys._getframe(), 0
    while frame.f_back is not None:
        frame = frame.f_back
        calls += frame.f_code is _RUN and frame.f_locals.get("self") is owner
    return calls > 1


def _borrowers(owner: nn.Module) -> Iterator[tuple[nn.Module, Slots]]:
    """The adapted modules whose weights the forward of ``owner`` reads."""
    for module in (owner, *(owner._modules.get(name) for name in read_children(owner))):
        slots = slots_of(module) if module is not None else None
        if module is not None and slots is not None and slots.base is not None:
            yield module, slots


def _may_lend(module: nn.Module) -> bool:
    if isinstance(module, nn.TransformerEncoder):
        return any(slots_of(inside) is not None for inside in module.modules())
    return any(True for _ in _borrowers(module))


def _loans(owner: nn.Module) -> Iterator[tuple[nn.Module, str, object]]:
    """What stands in place of what while ``owner`` runs; None for nothing."""
    if isinstance(owner, nn.TransformerEncoder) and torch.is_grad_enabled():
        # A frozen base in eval mode makes its forward pack padded batches into nested tensors, which attention takes
        # only where no gradient is asked for; it looks at the base's weights to know that, and not at adapters.
        yield owner, "use_nested_tensor", False
    for module, slots in _borrowers(owner):
        assert slots.base is not None
        tensors = _changed(module, slots, slots.base) if slots.enabled and not slots.merged else {}
        for name in (slots.base.weight_name, slots.base.bias_name):
            yield module, name, tensors.get(name)


def _changed(module: nn.Module, slots: Slots, base: BaseLayer) -> dict[str, Tensor]:
    """The module's own tensors as all active slots change them, by local name; those that none changes are missing."""
    tensors: dict[str, Tensor] = {}
    for name in slots.active:
        slot = slots.get(name)
        assert slot is not None
        if slot.adapter is not None:
            delta = ask_delta(type(module).__name__, slot.method, slot.adapter, base)
            _refuse_untrainable(slot, delta.weight, delta.bias)
            add_delta(module, base, delta, tensors)
        if slot.bias is not None:
            own = module._parameters[base.bias_name]
            assert own is not None
            # The difference is exactly 0 until the copy is trained, which keeps the first output bit-identical.
            tensors[base.bias_name] = tensors.get(base.bias_name, own) + (slot.bias - own).to(own.dtype)
    return tensors


def _refuse_untrainable(slot: Slot, *parts: Tensor | None) -> None:
    """A delta cut off from the adapter's parameters would be used, and never trained."""
    assert slot.adapter is not None
    trained = any(parameter.requires_grad and parameter.numel() for parameter in slot.adapter.parameters())
    if torch.is_grad_enabled() and trained and not any(part is not None and part.requires_grad for part in parts):
        raise PluginError(
            f"{plugin_of(slot.method)} answers tunerkit_delta with tensors that have no gradient, so the adapter "
            "would not be trained where only its delta is used; compute the delta from the parameters, not detached"
        )
