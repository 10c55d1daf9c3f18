"""Lending: while a module runs that reads weights past a forward, what adapters make of them stands in their place."""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from tunerkit.errors import AdapterError, PluginError
from tunerkit.injection.delta import add_delta, ask_delta, plugin_of
from tunerkit.injection.slots import Slot, Slots, apply_slots, base_modules, slots_of
from tunerkit.layers import BaseLayer

# The attribute of a module that runs now, with a loan for each call of it that has not ended.
_LOANS = "_tunerkit_loans"
_LOCK = threading.Lock()
_RUN = nn.Module._call_impl.__code__


@attrs.frozen(eq=False)
class _Loan:
    """One call of an owner: who runs it, and what stood as an attribute before where something is lent now."""

    thread: int
    before: list[tuple[nn.Module, str, object]] = attrs.Factory(list)


def lend_in_(model: nn.Module, readers: Iterable[nn.Module | None]) -> None:
    """Let ``readers``, which use weights of adapted modules directly, and encoders around adapted modules lend."""
    encoders = (module for _, module in base_modules(model) if isinstance(module, nn.TransformerEncoder))
    for module in (*readers, *filter(_may_lend, encoders)):
        if module is not None and lend not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(lend)
            module.register_forward_hook(give_back, always_call=True, prepend=True)


def is_lent(model: nn.Module, module: nn.Module) -> bool:
    """Whether a module of ``model`` that reads the weights of ``module`` gets what adapters make of them."""
    owners = (owner for owner in model.modules() if lend in owner._forward_pre_hooks.values())
    return any(borrower is module for owner in owners for borrower, _ in _borrowers(owner))


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
    if _lends_now(owner) or _LOANS in vars(owner):
        _uncompiled(_lend)(owner)


def give_back(owner: nn.Module, args: Any, output: Any) -> None:
    """The forward hook beside `lend`, called after an exception too."""
    if _LOANS in vars(owner):
        _uncompiled(_give_back)(owner)


def _uncompiled(function: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    """``function`` as code that dynamo leaves alone: it cannot trace what a plugin is asked through."""
    # Loading dynamo takes seconds, and who has not loaded it compiles nothing.
    return torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function


def _lend(owner: nn.Module) -> None:
    loan = _open_loan_(owner)
    for module, name, value in _changes(owner):
        loan.before.append((module, name, vars(module).get(name)))
        _shadow_(module, name, value)


def _open_loan_(owner: nn.Module) -> _Loan:
    """Note that ``owner`` starts to run. Raises `AdapterError` if it is running in another thread."""
    loan = _Loan(threading.get_ident())
    with _LOCK:
        loans: list[_Loan] = vars(owner).get(_LOANS, [])
        if loans and loans[-1].thread != loan.thread and loans[-1].thread in sys._current_frames():
            raise AdapterError(
                f"{type(owner).__name__} runs in two threads at once, and what adapters lend it is there for one call; "
                "call tunerkit.merge before serving a model from several threads"
            )
        if loans and not _is_nested(owner):
            # KeyboardInterrupt passes by every hook: the call before this one was never given back.
            _reclaim_(owner)
            loans = []
        vars(owner)[_LOANS] = [*loans, loan]
    return loan


def _give_back(owner: nn.Module) -> None:
    """Undo the last `_lend`, unless that was another thread's: the one that asks was refused."""
    loans: list[_Loan] = vars(owner)[_LOANS]
    if loans[-1].thread != threading.get_ident():
        return
    for module, name, before in reversed(loans[-1].before):
        _shadow_(module, name, before)
    vars(owner)[_LOANS] = loans[:-1]
    if not loans[:-1]:
        del vars(owner)[_LOANS]


def _reclaim_(owner: nn.Module) -> None:
    """Give back whatever is lent to ``owner``, whoever borrowed it."""
    for loan in reversed(vars(owner).pop(_LOANS, [])):
        for module, name, before in reversed(loan.before):
            _shadow_(module, name, before)


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
    """The adapted modules whose weights the forward of ``owner`` reads: those without a hook of their own.

    Who reads what is settled when the hooks are put in: a forward may be replaced afterwards, as accelerate does.
    """
    for module in (owner, *owner.children()):
        slots = slots_of(module)
        if slots is not None and slots.base is not None and apply_slots not in module._forward_hooks.values():
            yield module, slots


def _lends_now(owner: nn.Module) -> bool:
    if isinstance(owner, nn.TransformerEncoder):
        return torch.is_grad_enabled() and not owner.training and owner.use_nested_tensor
    return any(slots.enabled and slots.active and not slots.merged for _, slots in _borrowers(owner))


def _may_lend(module: nn.Module) -> bool:
    if isinstance(module, nn.TransformerEncoder):
        return any(slots_of(inside) is not None for inside in module.modules())
    return any(True for _ in _borrowers(module))


def _changes(owner: nn.Module) -> Iterator[tuple[nn.Module, str, object]]:
    """What stands in place of what while ``owner`` runs; None for nothing."""
    if isinstance(owner, nn.TransformerEncoder) and _lends_now(owner):
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
