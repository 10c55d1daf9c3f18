"""Counts the operations that torch dispatches, a deterministic measure of cost, and notes what they draw."""

import sys
from types import FrameType
from typing import Any

import torch

from tunerkit.layers import torch_private

_BETWEEN = frozenset({"torch", "contextlib", "functools"})


class Counting:
    """Counts the operations dispatched inside the block; an operation on a list of tensors counts once.

    Detaching is not counted: autograd does it for each node, and how often depends on the version of torch.

    ::

        with Counting() as mode:
            loss(model).backward()
        assert mode.count < 1000

    Attributes:
        count: The number of operations so far.
        drawn: The sum of each tensor of random numbers that was drawn, but for those that core draws.
        seeded: Whether one of them came from another generator than torch's default one.
    """

    def __init__(self) -> None:
        self.count, self.drawn, self.seeded = 0, list[float](), False

        def dispatch(mode: object, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += function is not torch.ops.aten.detach.default
            found = function(*args, **(kwargs or {}))
            if torch.Tag.nondeterministic_seeded in function.tags and not _by_core():
                self.drawn += [float(each.double().sum()) for each in [found] if isinstance(each, torch.Tensor)]
                self.seeded |= (kwargs or {}).get("generator") not in (None, torch.default_generator)
            return found

        self._mode = type("Mode", (torch_private.dispatch_mode(),), {"__torch_dispatch__": dispatch})()

    def __enter__(self) -> "Counting":
        self._mode.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._mode.__exit__(*error)


def _by_core() -> bool:
    """Whether it is core that called torch."""
    frame: FrameType | None = sys._getframe(2)
    package = ""
    while frame is not None and (package := frame.f_globals.get("__name__", "").partition(".")[0]) in _BETWEEN:
        frame = frame.f_back
    return package == "tunerkit"
