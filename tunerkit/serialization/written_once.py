"""Write a file of an adapter that several processes train together: one of them writes, and all return."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from tunerkit.injection import Tuner


def written_once(tuner: Tuner, place: Path, write: Callable[[], Path]) -> Path:
    """Return the path of the written file, in every process once it is there.

    Args:
        tuner: The adapter's handle.
        place: Where it is written.
        write: Writes it, and returns the path. It is called in one process of a training.
    """
    return tuner.engine.write_once(place, _content(tuner) if tuner.engine.is_shared else "", write)


def _content(tuner: Tuner) -> str:
    """Words that are the same in all processes, and others after each step or allocation.

    Weights are left out: on unlike hardware they may differ in their last bits.
    """
    state = [tuner.name, tuner.steps, len(tuner.history), tuner.ranks()]
    return hashlib.sha256(repr(state).encode()).hexdigest()[:16]
