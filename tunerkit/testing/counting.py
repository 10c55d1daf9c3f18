"""Counts the operations that torch dispatches: a deterministic measure of cost."""

from contextlib import ExitStack

from tunerkit.libraries import torch_private


class Counting:
    """Counts the operations dispatched inside the block; an operation on a list of tensors counts once.

    ::

        with Counting() as mode:
            loss(model).backward()
        assert mode.count < 1000

    Attributes:
        count: The number of operations so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._block = ExitStack()

    def __enter__(self) -> "Counting":
        self._block.enter_context(torch_private.counting(self._add))
        return self

    def __exit__(self, *error: object) -> None:
        self._block.close()

    def _add(self) -> None:
        self.count += 1
