"""Counts the operations that torch dispatches: a deterministic measure of cost."""

from typing import Any

import torch

from tunerkit.layers import torch_private


class Counting:
    """Counts the operations dispatched inside the block; an operation on a list of tensors counts once.

    Detaching is not counted: autograd does it for each node, and how often depends on the version of torch.

    ::

        with Counting() as mode:
            loss(model).backward()
        assert mode.count < 1000

    Attributes:
        count: The number of operations so far.
    """

    def __init__(self) -> None:
        self.count = 0

        def dispatch(mode: object, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += function is not torch.ops.aten.detach.default
            return function(*args, **(kwargs or {}))

        self._mode = type("Mode", (torch_private.dispatch_mode(),), {"__torch_dispatch__": dispatch})()

    def __enter__(self) -> "Counting":
        self._mode.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._mode.__exit__(*error)
