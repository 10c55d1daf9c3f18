"""The link between an adapter and the optimizer that drives it."""

from weakref import WeakKeyDictionary

import attrs
from torch.optim import Optimizer

from tunerkit.engine import Engine, Removable
from tunerkit.injection import Tuner

# An optimizer does not know what trains with it, and resizing is given nothing but an optimizer.
_engines: WeakKeyDictionary[Optimizer, Engine] = WeakKeyDictionary()


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


def is_attached(tuner: Tuner) -> bool:
    """Whether an optimizer currently drives ``tuner``."""
    link = tuner.progress.link
    return link is not None and bool(link.handles) and link.optimizer() is not None


def optimizer_of(tuner: Tuner) -> Optimizer | None:
    """Return the optimizer that drives an adapter, or that drove it last.

    Args:
        tuner: The adapter's handle.

    Returns:
        The optimizer; None if the adapter was never attached, or if the optimizer no longer exists.
    """
    link = tuner.progress.link
    return None if link is None else link.optimizer()


def note_engine(optimizer: Optimizer, engine: Engine) -> None:
    """Note what the processes of a training with this optimizer do together."""
    _engines[optimizer] = engine


def engine_of(optimizer: Optimizer | None) -> Engine | None:
    """Return what `note_engine` noted for an optimizer; None if nothing was attached to it."""
    return None if optimizer is None else _engines.get(optimizer)
