"""Manage the adapters of a model by name."""

from collections.abc import Sequence

from torch import nn

from tunerkit.errors import AdapterError
from tunerkit.injection import (
    Tuner,
    activate_,
    check_name,
    eject_,
    inside,
    refuse_disabled,
    refuse_merged,
    refuse_rivals,
    refuse_taken,
    rename_,
    require_tuners,
    train_,
    tuners_of,
    wrapped_of,
)
from tunerkit.injection import tuner as find_tuner
from tunerkit.steps import detach


def adapters(model: nn.Module) -> dict[str, Tuner]:
    """The tuners of ``model`` by adapter name, the oldest first; empty for a model without adapters."""
    return dict(tuners_of(inside(model)))


def active(model: nn.Module) -> tuple[str, ...]:
    """The names of the active adapters in the order they are applied; empty for a model without adapters."""
    tuners = adapters(model)
    return wrapped_of(next(iter(tuners.values())).model).active if tuners else ()


def activate(model: nn.Module, names: str | Sequence[str]) -> None:
    """Apply exactly the adapters named, in that order; the others stay in the model and do nothing.

    An empty sequence shows the base. Adapters stay attached: a step of the optimizer is one of those that are active
    or have a gradient.

    Raises `AdapterError`: an unknown name, a name given twice, two adapters that train the same module in full, a
    merged model, inside `disabled`. Nothing is changed then.
    """
    if not isinstance(names, Sequence):
        raise AdapterError(f"expected a name or a list of names in order, got {type(names).__name__} {names!r}")
    names = (names,) if isinstance(names, str) else tuple(names)
    root = _root(model)
    for name in names:
        _named(root, name)
    if twice := [name for number, name in enumerate(names) if name in names[:number]]:
        raise AdapterError(f"adapter {twice[0]!r} is named twice; name each adapter once")
    _refuse_fixed(root, "activating adapters")
    refuse_rivals(root, names)
    activate_(root, names)


def freeze(model: nn.Module, adapter: str) -> None:
    """Stop training one adapter: it is applied as before, and takes no step where it is attached, until `thaw`.

    Its gradients are dropped, so that a stale one moves nothing. Raises `AdapterError` for an unknown name.
    """
    train_(_named(model, adapter), trained=False)


def thaw(model: nn.Module, adapter: str) -> None:
    """Train an adapter (on): the one frozen before, or one loaded to be used. Attached, it goes on where it stood.

    All its parameters are trained then (integers aside). Raises `AdapterError` for an unknown name.
    """
    train_(_named(model, adapter), trained=True)


def rename(model: nn.Module, old: str, new: str) -> None:
    """Give an adapter another name; it stays attached, and its parameters are the same objects.

    Raises `AdapterError`: an unknown name, or a new one that is taken or no legal name.
    """
    tuner = _named(model, old)
    check_name(new)
    refuse_taken(adapters(model), new)
    rename_(tuner, new)


def delete(model: nn.Module, adapter: str) -> None:
    """Take one adapter out and detach it; the others stay as they are. After the last one the model is the base.

    An optimizer that holds its parameters goes on holding them, without gradients.

    Raises `AdapterError`: an unknown name, a merged model, inside `disabled`. Nothing is changed then.
    """
    tuner = _named(model, adapter)
    _refuse_fixed(tuner.model, "deleting an adapter")
    detach(tuner)
    train_(tuner, trained=False)
    eject_(tuner)


def _root(model: nn.Module) -> nn.Module:
    """The model that was wrapped, seen through what holds it."""
    return next(iter(require_tuners(inside(model)).values())).model


def _named(model: nn.Module, adapter: object) -> Tuner:
    if not isinstance(adapter, str):
        raise AdapterError(f"expected an adapter's name, got {type(adapter).__name__} {adapter!r}")
    return find_tuner(inside(model), adapter)


def _refuse_fixed(model: nn.Module, what: str) -> None:
    refuse_disabled(model)
    refuse_merged(model, what)
