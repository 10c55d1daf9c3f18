"""The link between an adapter and the optimizer that drives it."""

import attrs
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tunerkit.injection import Tuner


def hold(tuner: Tuner, *handles: RemovableHandle) -> None:
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
