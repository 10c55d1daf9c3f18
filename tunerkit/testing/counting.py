"""Counts the operations that torch dispatches: what a step costs, deterministically."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs

from tunerkit.libraries import torch_private


@attrs.define
class Count:
    """How many operations there have been."""

    count: int = 0


@contextmanager
def counting() -> Iterator[Count]:
    """``count`` operations were dispatched inside the block; one on a list of tensors is one, however long the list.

    ::

        with counting() as operations:
            loss(model).backward()
        assert operations.count < 1000
    """
    found = Count()

    def dispatch(mode: object, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found.count += 1
        return function(*args, **(kwargs or {}))

    with type("Counting", (torch_private.dispatch_mode(),), {"__torch_dispatch__": dispatch})():
        yield found
