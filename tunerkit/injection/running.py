"""Rejects changes to a model that runs in another thread, as far as the interpreter's frames show it."""

import sys
import threading
from collections.abc import Iterator
from types import FrameType

from torch import nn

from tunerkit.errors import AdapterError

# The code of every call of a module, whatever its class: it is in the frames of a thread that runs a forward.
_CALL = nn.Module.__call__.__code__


def refuse_running(model: nn.Module, what: str) -> None:
    """Raise `AdapterError` if another thread is inside a forward of ``model`` or of a module in it.

    Its output would be computed in part before and in part after the change. A forward that starts after this check,
    or that runs in code without a frame of its own, is not seen: that takes a lock of the caller's.
    """
    if not (running := {id(module) for module in _running_elsewhere()}):
        return
    found = next((module for module in model.modules() if id(module) in running), None)
    if found is not None:
        raise AdapterError(
            f"another thread runs {type(found).__name__}, a part of the model, and its output would be wrong if "
            f"{what} changed the model now; wait until it is done, and hold one lock for both in your server"
        )


def _running_elsewhere() -> Iterator[nn.Module]:
    """Yield the modules that the other threads are calling now, the innermost calls first."""
    for thread, innermost in sys._current_frames().items():
        frame: FrameType | None = innermost if thread != threading.get_ident() else None
        while frame is not None:
            if frame.f_code is _CALL:
                yield frame.f_locals["self"]
            frame = frame.f_back
