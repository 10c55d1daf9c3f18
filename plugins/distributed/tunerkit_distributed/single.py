"""The engine of one process, and of processes that train adapters of their own."""

from collections.abc import Mapping, Sequence

from torch.optim import Optimizer

from tunerkit.hooks import Engine, Removable
from tunerkit.plugin import Tuner
from tunerkit_distributed.reducers import Reducers

_APART = "with data_parallel=False each process decides for itself, and DistributedDataParallel needs equal shapes"


class Single(Engine):
    """Nothing is done together; but there may be a DistributedDataParallel of one process around the model."""

    def __init__(self) -> None:
        self._reducers = Reducers()

    @property
    def fixed_shapes(self) -> str | None:
        """Why a parameter's shape must not change: DDP may be one that cannot be rebuilt."""
        return self._reducers.obstacle()

    def begin_(self, adapters: Sequence[Tuner], optimizer: Optimizer | None) -> Mapping[str, tuple[Removable, ...]]:
        """Note the models, which may be in DDP."""
        self._reducers.add_(tuner.model for tuner in adapters)
        self._reducers.follow_()
        return {}

    def resized_(self) -> None:
        """Build the reducer of DDP anew. See `Engine`."""
        self._reducers.rebuild_()


class Apart(Engine):
    """A process of a group that trains adapters of its own: ``data_parallel=False``. Under DDP, shapes stay even so."""

    name = "a process that trains adapters of its own"

    def __init__(self) -> None:
        self._reducers = Reducers()

    @property
    def fixed_shapes(self) -> str | None:
        """Why a parameter's shape must not change. Without DDP each process may."""
        return _APART if self._reducers.found() else None

    def begin_(self, adapters: Sequence[Tuner], optimizer: Optimizer | None) -> Mapping[str, tuple[Removable, ...]]:
        """Note the models, which may be in DDP."""
        self._reducers.add_(tuner.model for tuner in adapters)
        return {}
