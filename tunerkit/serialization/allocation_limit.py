"""A limit on the tensors that a plugin makes while it builds an adapter from a file's config."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tunerkit.errors import FileError, cut
from tunerkit.records import Target

# A plugin may make tensors that it does not keep, such as a factor of the weight in float64.
_FACTOR, _ALWAYS = 4, 2**16


class _Limit(TorchFunctionMode):
    """Rejects each call of torch whose sizes, or whose result, have more than ``elements`` elements."""

    def __init__(self, elements: int, message: str) -> None:
        super().__init__()
        self.elements = elements
        self.message = message

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES:
            self._refuse_above(_asked(args, kwargs))
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            self._refuse_above(result.numel())
        return result

    def _refuse_above(self, elements: int) -> None:
        if elements > self.elements:
            raise FileError(self.message)


# The functions that are given a size. Others are checked by their results.
_FACTORIES = frozenset(
    {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.eye, torch.normal}
    | {torch.randperm, torch.arange, torch.randint, Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones}
    | {Tensor.new_full, Tensor.repeat, Tensor.resize_}
)


def _asked(args: Sequence[object], kwargs: Mapping[str, object]) -> int:
    """The number of elements that a factory is asked for: the product of the sizes in its arguments."""
    given = [*args, kwargs.get("size")]
    sizes = next((arg for arg in given if isinstance(arg, list | tuple)), [arg for arg in args if type(arg) is int])
    return math.prod(abs(size) for size in sizes if isinstance(size, int))


def limit_for(tensors: Mapping[str, Tensor], source: str) -> Callable[[Target], AbstractContextManager[object]]:
    """Return what to enter while the adapter of a target is built.

    A file's config may ask for more memory than there is, in a file of a few bytes. An adapter that fits the file needs
    no more than the file's tensors for this target. For what a plugin computes meanwhile, a few times the size of the
    target's own weights is added.

    Args:
        tensors: The file's tensors.
        source: The file, for the error.
    """
    held: dict[str, int] = {}
    for name, tensor in tensors.items():
        path = name.partition(".adapter.")[0]
        held[path] = held.get(path, 0) + tensor.numel()

    def limit(target: Target) -> _Limit:
        own = held.get(target.path, 0) + _elements(target.module)
        return _Limit(
            _FACTOR * own + _ALWAYS,
            f"{source} does not fit its own header: by its config, the adapter at {cut(target.path, 200)!r} needs many "
            f"times more memory than the {held.get(target.path, 0)} values that the file has for it",
        )

    return limit


def _elements(module: nn.Module) -> int:
    """The number of values in the module's own weights, of which integers may pack several: two in each byte."""
    own = chain(module.parameters(recurse=False), module.buffers(recurse=False))
    return sum(t.numel() if t.is_floating_point() else 2 * t.numel() * t.element_size() for t in own)
