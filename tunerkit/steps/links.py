"""Which optimizer drives which adapter."""

from weakref import WeakKeyDictionary, ref

import attrs
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tunerkit.injection import Tuner


@attrs.frozen(eq=False)
class Link:
    """The hooks that an optimizer drives a tuner by. They stay until `detach`; the optimizer is remembered after it."""

    optimizer: "ref[Optimizer]"
    handles: tuple[RemovableHandle, ...]


# Not in the tuner: a deep copy of the model must not believe that the original's optimizer drives it. The values hold
# no tuner, else none would ever be freed: the optimizer alone keeps the driver alive.
_links: WeakKeyDictionary[Tuner, Link] = WeakKeyDictionary()


def hold(tuner: Tuner, *handles: RemovableHandle) -> None:
    """Keep further hooks of the optimizer that drives ``tuner`` until `detach`."""
    link = _links[tuner]
    _links[tuner] = attrs.evolve(link, handles=(*link.handles, *handles))


def detach(tuner: Tuner) -> None:
    """Undo `attach`; a tuner that is not attached stays as it is."""
    link = _links.get(tuner)
    if link is not None:
        for handle in link.handles:
            handle.remove()
        _links[tuner] = attrs.evolve(link, handles=())


def is_attached(tuner: Tuner) -> bool:
    """Whether an optimizer drives ``tuner`` now."""
    link = _links.get(tuner)
    return link is not None and bool(link.handles) and link.optimizer() is not None


def optimizer_of(tuner: Tuner) -> Optimizer | None:
    """The optimizer that drives ``tuner``, or that drove it last and is still there."""
    link = _links.get(tuner)
    return None if link is None else link.optimizer()
