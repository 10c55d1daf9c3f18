"""Attached or not: which optimizer drives an adapter."""

import attrs
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tunerkit.injection import Tuner


def hold(tuner: Tuner, *handles: RemovableHandle) -> None:
    """Keep further hooks of the optimizer that drives ``tuner`` until `detach`."""
    link = tuner.progress.link
    assert link is not None
    tuner.progress.link = attrs.evolve(link, handles=(*link.handles, *handles))


def detach(tuner: Tuner) -> None:
    """Undo `attach`; a tuner that is not attached stays as it is."""
    link = tuner.progress.link
    if link is not None:
        for handle in link.handles:
            handle.remove()
        tuner.progress.link = attrs.evolve(link, handles=())


def is_attached(tuner: Tuner) -> bool:
    """Whether an optimizer drives ``tuner`` now."""
    link = tuner.progress.link
    return link is not None and bool(link.handles) and link.optimizer() is not None


def optimizer_of(tuner: Tuner) -> Optimizer | None:
    """The optimizer that drives ``tuner``, or that drove it last and is still there."""
    link = tuner.progress.link
    return None if link is None else link.optimizer()
