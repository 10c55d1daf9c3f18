"""Counts the operations that torch dispatches: what a step costs, deterministically."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Counting(TorchDispatchMode):
    """``count`` operations were dispatched inside the block; one on a list of tensors is one, however long the list.

    ::

        with Counting() as mode:
            loss(model).backward()
        assert mode.count < 1000
    """

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))
