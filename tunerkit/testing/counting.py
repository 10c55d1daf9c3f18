"""Counts the operations that torch dispatches: what a step costs, deterministically."""

from contextlib import ExitStack

from tunerkit.libraries import torch_private


class Counting:
    """``count`` operations were dispatched inside the block; one on a list of tensors is one, however long the list.

    ::

        with Counting() as mode:
            loss(model).backward()
        assert mode.count < 1000
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
