"""Manage a model's adapters by name."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from tunerkit import hooks, injection, steps
from tunerkit.errors import AdapterError
from tunerkit.injection import Tuner


def adapters(model: nn.Module) -> dict[str, Tuner]:
    """Return the tuners of a model.

    Args:
        model: A model, wrapped or not.

    Returns:
        The tuners by adapter name, the oldest first; empty for a model without adapters. They print one per line.
    """
    return injection.Adapters(injection.tuners_of(model))


def active(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the active adapters.

    Args:
        model: A model, wrapped or not.

    Returns:
        The names in the order in which the adapters are applied; empty for a model without adapters.
    """
    tuners = adapters(model)
    return injection.wrapped_of(next(iter(tuners.values())).model).active if tuners else ()


def activate(model: nn.Module, names: str | Sequence[str]) -> None:
    """Apply exactly these adapters, in this order. The others stay in the model without effect.

    Adapters stay attached. An adapter takes part in an optimizer step if it is active or has a gradient.

    Args:
        model: The wrapped model.
        names: An adapter's name, or several names in order. With an empty sequence, the model acts as the base model.

    Raises:
        AdapterError: A name is unknown or given twice, two of the adapters train the same module in full, the model is
            merged or running in another thread, or the call is inside `disabled`. Nothing is changed then.
    """
    if not isinstance(names, Sequence):
        raise AdapterError(f"expected a name or a list of names in order, got {type(names).__name__} {names!r}")
    names = (names,) if isinstance(names, str) else tuple(names)
    root = injection.wrapped_model(model)
    for number, name in enumerate(names):
        _named(root, name)
        if name in names[:number]:
            raise AdapterError(f"adapter {name!r} is named twice; name each adapter once")
    injection.refuse_fixed(root, "activating adapters")
    injection.activate_(root, names)


def freeze(model: nn.Module, adapter: str) -> None:
    """Stop training an adapter but keep applying it, until `thaw`. Optimizer steps skip it.

    Its gradients are dropped, so that a stale gradient cannot change it.

    Args:
        model: The wrapped model.
        adapter: The adapter's name.

    Raises:
        AdapterError: The name is unknown.
    """
    injection.train_(_named(model, adapter), trained=False)


def thaw(model: nn.Module, adapter: str) -> None:
    """Make an adapter trainable that was frozen or loaded for inference.

    An attached adapter resumes training at its own step count. All its parameters become trainable, except integer ones
    and parameters that its method keeps fixed.

    Args:
        model: The wrapped model.
        adapter: The adapter's name.

    Raises:
        AdapterError: The name is unknown.
    """
    injection.train_(_named(model, adapter), trained=True)


def rename(model: nn.Module, old: str, new: str) -> None:
    """Rename an adapter. It stays attached, and its parameters stay the same objects.

    Args:
        model: The wrapped model.
        old: The current name.
        new: The new name: any text without "." or "/", up to 64 characters.

    Raises:
        AdapterError: The old name is unknown, or the new one is taken or invalid.
    """
    tuner = _named(model, old)
    injection.check_name(new, taken=adapters(model))
    injection.rename_(tuner, new)


def delete(model: nn.Module, adapter: str) -> None:
    """Remove an adapter from the model and detach it. Without any adapter left, the model is the base model again.

    The adapter's optimizer still has its parameters, without gradients.

    Args:
        model: The wrapped model.
        adapter: The adapter's name.

    Raises:
        AdapterError: The name is unknown, the model is merged or running in another thread, or the call is inside
            `disabled`. Nothing is changed then.
    """
    tuner = _named(model, adapter)
    injection.refuse_fixed(tuner.model, "deleting an adapter")
    injection.refuse_running(tuner.model, "deleting an adapter")
    with ExitStack() as rest:  # a KeyboardInterrupt completes the deletion, since `detach` cannot be undone
        rest.callback(steps.unwatch_, tuner.model)
        rest.callback(injection.eject_, [tuner])
        steps.detach(tuner)
        injection.train_(tuner, trained=False)
        injection.eject_([tuner])
        steps.unwatch_(tuner.model)
        rest.pop_all()


def _named(model: nn.Module, adapter: object) -> Tuner:
    if not isinstance(adapter, str):
        raise AdapterError(f"expected an adapter's name, got {type(adapter).__name__} {adapter!r}")
    return injection.tuner(model, adapter)


def reference(model: nn.Module) -> Any:
    """Make a frozen reference of a wrapped model's current state, for preference training.

    The reference is a module that runs the model itself, in eval mode and without gradients, so it needs no second copy
    of the base. It copies and freezes trained adapters, and leaves out adapters that add nothing yet. Training,
    activating or freezing adapters later does not change its output::

        DPOTrainer(model, ref_model=tunerkit.reference(model), ...)

    A call changes the model's active adapters while it runs, so no other thread may run the model during a call. A deep
    copy contains a copy of the model. ``parameters()`` yields nothing; ``state_dict()`` has the reference's tensors.

    Args:
        model: The wrapped model, which may be inside DDP or a compiled module.

    Returns:
        The reference, with the model's arguments and outputs. A call raises `AdapterError` if the model is merged or
        was unwrapped in the meantime.

    Raises:
        AdapterError: The model has no adapter, is merged, or is inside `disabled`; or no installed plugin makes
            references, as tunerkit-transformers does.
    """
    found = hooks.first(hooks.specs.tunerkit_reference, model=model)
    if found is None:
        lacking = hooks.registry.lacking("makes references")
        raise AdapterError(lacking or f"no plugin makes references of a {type(model).__name__}; use a frozen copy")
    return found
