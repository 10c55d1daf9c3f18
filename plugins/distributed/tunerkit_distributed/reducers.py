"""Rebuild the reducer of a DistributedDataParallel around adapters after parameters change shape.

A reducer has gradient buckets of fixed size, so each change of a shape needs a new reducer. DDP's code for unpickling
builds a reducer, and is called in place.
"""

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tunerkit.errors import StepError
from tunerkit_distributed import torch_private

_ADVICE = "to let adapters change shape, leave DistributedDataParallel out: attach then averages the gradients"
_SHAPES = "_tunerkit_shapes"  # the attribute of a DDP with the shapes that its reducer was built for


class Reducers:
    """Finds and rebuilds the DistributedDataParallel around models, if there is one."""

    def __init__(self) -> None:
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    @property
    def models(self) -> Iterable[nn.Module]:
        """The models inside which adapters are trained."""
        return self._models

    def add_(self, models: Iterable[nn.Module]) -> None:
        """Add models, around which DDP may be."""
        self._models.update(models)

    def found(self) -> list[DistributedDataParallel]:
        """Return each DDP around one of the models; an empty list without a process group."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return []
        return torch_private.ddps_around(list(self._models))

    def obstacle(self) -> str | None:
        """Return why parameters must not change shape; None without a DDP, or if it can be rebuilt."""
        found = self.found()
        reason = f"it is inside {len(found)} of them" if len(found) > 1 else next(map(_obstacle, found), None)
        return reason and f"DistributedDataParallel cannot be rebuilt around this model: {reason}; {_ADVICE}"

    def follow_(self) -> list[DistributedDataParallel]:
        """Hook each DDP, so that a forward rebuilds its reducer if shapes have changed; rebuild it now if they have.

        The hook covers ``load_state_dict`` with an adapter of other ranks; `shrink_` and `grow_` call `rebuild_`. A
        reducer is also rebuilt without empty parameters (rank 0), for whose gradients DDP would wait forever.

        Returns:
            Each DDP around one of the models.

        Raises:
            StepError: A reducer must be rebuilt, and cannot be: see `obstacle`; or a backward is running.
        """
        found = self.found()
        for ddp in found:
            if _SHAPES not in vars(ddp):
                averaged = torch_private.averaged_by(ddp)
                _note_(ddp, averaged)
                if not (torch_private.is_built_for(ddp, averaged) and all(p.numel() for p in averaged)):
                    _rebuild_(ddp)
                ddp.register_forward_pre_hook(_rebuild_if_resized_)
        return found

    def rebuild_(self) -> None:
        """Rebuild DDP's reducer for the current shapes. All ranks must call this."""
        for ddp in self.follow_():
            _rebuild_(ddp)


def _obstacle(ddp: DistributedDataParallel) -> str | None:
    """Return why this DDP's reducer cannot be rebuilt; None if it can."""
    if type(ddp) is not DistributedDataParallel:
        return f"{type(ddp).__name__} is a class of its own"
    if getattr(ddp, "reducer", None) is None:
        return "it has no reducer, since the all-reduce of all parameters is delayed"
    if missing := torch_private.missing_for_rebuilding(ddp):
        return f"this release of torch has no {', '.join(missing)}"
    if ddp.process_group != torch.distributed.group.WORLD:
        return "its process group is not the default one"
    if ddp.mixed_precision is not None:
        return "it has a mixed_precision of its own"
    return torch_private.special_way_of_reducing(ddp)


def _note_(ddp: DistributedDataParallel, averaged: Iterable[Tensor]) -> None:
    """Record the shapes for which the reducer was built, by parameter index, which survives pickling and copying."""
    own = set(map(id, averaged))
    known = enumerate(torch_private.parameters_of(ddp))
    vars(ddp)[_SHAPES] = {place: parameter.shape for place, parameter in known if id(parameter) in own}


def _rebuild_(ddp: DistributedDataParallel) -> None:
    """Give a DDP a new reducer.

    Raises:
        StepError: It cannot be rebuilt, or a backward is running.
    """
    reason = "a backward is running" if torch_private.running_backward() >= 0 else _obstacle(ddp)
    if reason is not None:
        raise StepError(
            f"DistributedDataParallel was built for other adapter ranks than the current ones, or for a rank of 0, and "
            f"cannot be rebuilt: {reason}. Load adapters before you build it, and attach them after"
        )
    known = torch_private.parameters_of(ddp)
    averaged = [known[place] for place in vars(ddp)[_SHAPES]]
    torch_private.rebuild_reducer_(ddp, [p for p in averaged if p.numel()] or averaged)
    _note_(ddp, averaged)


def _rebuild_if_resized_(ddp: DistributedDataParallel, args: object) -> None:
    """Forward pre-hook of DDP: rebuild its reducer if the shapes differ from the recorded ones."""
    known = torch_private.parameters_of(ddp)
    if any(known[place].shape != shape for place, shape in vars(ddp)[_SHAPES].items()):
        _rebuild_(ddp)
