"""How far the training of one adapter is, and which optimizer drives it."""

from typing import Any
from weakref import ref

import attrs
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tunerkit.records import RankChange


@attrs.frozen(eq=False)
class Link:
    """The hooks through which an optimizer drives an adapter. They stay until `detach`, which remembers the optimizer.

    It holds no tuner: the optimizer alone keeps its driver alive, so that a model can be freed.
    """

    optimizer: "ref[Optimizer]"
    handles: tuple[RemovableHandle, ...]


@attrs.define(eq=False)
class Progress:
    """What changes while an adapter trains. Only the step driver and resuming write to it.

    ``state`` belongs to the method, from `attach` on.
    """

    steps: int = 0
    total_steps: int | None = None
    state: object | None = None
    history: list[RankChange] = attrs.field(factory=list)
    link: Link | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The optimizer of the original does not drive a deep copy.
        return {**attrs.asdict(self, recurse=False), "link": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
