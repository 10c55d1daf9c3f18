"""Counts the operations that torch dispatches: a deterministic measure of cost."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Counting(TorchDispatchMode):
    """Counts the operations dispatched inside the block; an operation on a list of tensors counts once.

    ::

        with Counting() as mode:
            loss(model).backward()
        assert mode.count < 1000

    Attributes:
        count: The number of operations so far.
    """

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))
