"""The training progress of one adapter, and the link to the optimizer that drives it."""

from typing import Any
from weakref import ref

import attrs
from torch.optim import Optimizer

from tunerkit.engine import Alone, Engine, Removable
from tunerkit.records import RankChange


@attrs.frozen(eq=False)
class Link:
    """The hooks through which an optimizer drives an adapter. They stay until `detach`, which remembers the optimizer.

    ``engine`` is what the processes of the training do together.

    It holds no tuner: only the optimizer keeps its driver alive, so that a model can be freed.
    """

    optimizer: "ref[Optimizer]"
    handles: tuple[Removable, ...]
    engine: Engine = attrs.field(factory=Alone)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # A deep copy or pickle holds None instead: the optimizer does not drive the copy.
        return type(None), ()


@attrs.define(eq=False)
class Progress:
    """What changes after an adapter was put into a model, and what the base was then.

    Only the step driver, saving, resuming and merging write to it.

    Attributes:
        steps: The optimizer steps taken.
        total_steps: The length of training in optimizer steps, if it is known.
        state: The method's own training state, from `attach` on.
        history: The allocations so far, the oldest first.
        link: The connection to the optimizer, from `attach` on.
        calibration: How much data set the adapter's start: the numbers of batches and of input rows; None if none did.
        fingerprint: The base's fingerprint, kept if a permanent merge overwrote the base.
        shapes: The shapes of the base's parameters when the adapter was put in.
        beside: New modules of the base that another adapter, active at that time, trains in full. The fingerprint
            leaves them out, because the adapter never used the base's own values.
        noted: The base's fingerprint when the adapter was put in, if this process is in a group: it may shard the base
            afterwards.
        seed: The seed that `wrap` was given.
        files: The files that it was loaded from or saved to, with what each holds: ``"adapter"`` or ``"state"``.
    """

    steps: int = 0
    total_steps: int | None = None
    state: object | None = None
    history: list[RankChange] = attrs.field(factory=list)
    link: Link | None = None
    calibration: dict[str, int] | None = None
    fingerprint: dict[str, dict[str, Any]] | None = None
    shapes: dict[str, tuple[int, ...]] = attrs.field(factory=dict)
    beside: tuple[str, ...] = ()
    noted: dict[str, dict[str, Any]] | None = None
    seed: int | None = None
    files: dict[str, str] = attrs.field(factory=dict)
