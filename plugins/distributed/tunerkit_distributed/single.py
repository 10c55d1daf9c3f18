"""The engines without synchronization: for a single process, and for ranks that train independent adapters."""

from collections.abc import Mapping, Sequence

from torch.optim import Optimizer

from tunerkit.plugin import Engine, Tuner
from tunerkit.plugin.engines import Removable
from tunerkit_distributed.reducers import Reducers

_APART = "with data_parallel=False each process decides for itself, and DistributedDataParallel needs equal shapes"


class Single(Engine):
    """A single process, which may have a DistributedDataParallel around the model."""

    def __init__(self) -> None:
        self._reducers = Reducers()

    @property
    def fixed_shapes(self) -> str | None:
        """The reason why parameters must not change shape: a DDP that cannot be rebuilt. None if they may."""
        return self._reducers.obstacle()

    def begin_(self, adapters: Sequence[Tuner], optimizer: Optimizer | None) -> Mapping[str, tuple[Removable, ...]]:
        """Record the models, and hook the DDP around them, if there is one."""
        self._reducers.add_(tuner.model for tuner in adapters)
        self._reducers.follow_()
        return {}

    def resized_(self) -> None:
        """Rebuild DDP's reducer. See `Engine`."""
        self._reducers.rebuild_()


class Apart(Engine):
    """A rank that trains independent adapters: ``data_parallel=False``. Under DDP, shapes must not change."""

    name = "a process that trains adapters of its own"

    def __init__(self) -> None:
        self._reducers = Reducers()

    @property
    def fixed_shapes(self) -> str | None:
        """The reason why parameters must not change shape under DDP; None without DDP."""
        return _APART if self._reducers.found() else None

    def begin_(self, adapters: Sequence[Tuner], optimizer: Optimizer | None) -> Mapping[str, tuple[Removable, ...]]:
        """Record the models, for the search for a DDP around them."""
        self._reducers.add_(tuner.model for tuner in adapters)
        return {}
