"""Counts the collectives of a process and what they carry, below everything that could call them."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from tunerkit.layers import torch_private


class Collectives:
    """Notes the collectives called inside: ``calls`` and ``bytes`` by torch's names, ``sizes`` by bytes of a call."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.sizes: Counter[tuple[str, int]] = Counter()

        def dispatch(mode: object, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            space, _, name = function.name().partition("::")
            if space in ("c10d", "_c10d_functional"):
                self.calls[name] += 1
                size = sum(tensor.numel() * tensor.itemsize for tensor in _handed_over(args))
                self.bytes[name] += size
                self.sizes[name, size] += 1
            return function(*args, **(kwargs or {}))

        self._mode = type("Mode", (torch_private.dispatch_mode(),), {"__torch_dispatch__": dispatch})()

    def __enter__(self) -> "Collectives":
        self._mode.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._mode.__exit__(*error)


def _handed_over(args: Any) -> Iterator[Tensor]:
    """The tensors that a process gives, without those for the answer, which come first where there are both."""
    lists = [arg for arg in args if isinstance(arg, Tensor) or _tensors(arg)]
    given = lists[min(len(lists), 2) - 1] if lists else []
    yield from [given] if isinstance(given, Tensor) else _tensors(given)


def _tensors(arg: Any) -> list[Tensor]:
    """The tensors in a list, and in lists in it."""
    if not isinstance(arg, list | tuple):
        return []
    return [each for item in arg for each in ([item] if isinstance(item, Tensor) else _tensors(item))]
