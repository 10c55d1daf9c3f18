"""A limit on the tensors that a plugin makes while it builds an adapter from a file's config."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tunerkit.errors import FileError, cut
from tunerkit.paths import CHILD
from tunerkit.records import Target

# A plugin may make tensors that it does not keep, such as a factor of the weight in float64.
_FACTOR, _ALWAYS = 4, 2**16
# A rank or a number of steps up to this is nothing unusual, whatever the file's tensors are like.
_USUAL = 1024


class AllocationLimit(TorchFunctionMode):
    """Rejects calls of torch with more elements than a target can need, while its adapter is built from a file.

    A file's config may ask for more memory than there is, in a file of a few bytes. An adapter that fits the file needs
    no more than the file's tensors for this target. For what a plugin computes meanwhile, a few times the size of the
    target's own weights is added.

    Args:
        tensors: The file's tensors.
        source: The file, for the error.
    """

    def __init__(self, tensors: Mapping[str, Tensor], source: str) -> None:
        super().__init__()
        self._source = source
        self._held: dict[str, int] = {}
        for name, tensor in tensors.items():
            path, of_shared, _ = name.partition(f".{CHILD}.")
            path = path if of_shared else name.rpartition(".adapter.")[0]
            self._held[path] = self._held.get(path, 0) + tensor.numel()

    def __call__(self, target: Target) -> "AllocationLimit":
        """Return what to enter while the adapter of ``target`` is built. Raises `FileError` inside."""
        self._target = target
        return self

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
        if elements <= _ALWAYS:
            return
        held = self._held.get(self._target.path, 0)
        if elements > _FACTOR * (held + _elements(self._target.module)) + _ALWAYS:
            raise FileError(
                f"{self._source} does not fit its own header: by its config, the adapter at "
                f"{cut(self._target.path, 200)!r} needs many times more memory than the {held} values that the file "
                "has for it"
            )


def limit_for(
    config: object, tensors: Mapping[str, Tensor], source: str
) -> Callable[[Target], AbstractContextManager[object]]:
    """Return what to enter while the adapter of a target is built: an `AllocationLimit`, or nothing if none is needed.

    The limit costs time in every call of torch. A config with no number above the dimensions that the file's tensors
    have cannot ask for much more than the file has.

    Args:
        config: The config in the file: plain values in lists and dicts.
        tensors: The file's tensors.
        source: The file, for the error.
    """
    largest = max([_USUAL, *(size for tensor in tensors.values() for size in tensor.shape)])
    may_matter = any(number > largest for number in _numbers(config))
    return AllocationLimit(tensors, source) if may_matter else nullcontext


def _numbers(config: object) -> Iterator[float]:
    """The numbers in plain values."""
    match config:
        case dict():
            for value in config.values():
                yield from _numbers(value)
        case list():
            for value in config:
                yield from _numbers(value)
        case int() | float():
            yield config


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


def _elements(module: nn.Module) -> int:
    """The number of values in the module's own weights, of which integers may pack several: two in each byte."""
    own = chain(module.parameters(recurse=False), module.buffers(recurse=False))
    return sum(t.numel() if t.is_floating_point() else 2 * t.numel() * t.element_size() for t in own)
