"""Counts of dispatched operations, and of places where a host would wait for a device."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Operations that always read device memory. On a CPU they stand in for synchronizations of a GPU.
_WAITING = frozenset(
    {
        aten._local_scalar_dense.default,
        aten.is_nonzero.default,
        aten.equal.default,
        aten.nonzero.default,
        aten.masked_select.default,
    }
)
# On the CPU these are not dispatched, so they are intercepted as calls.
_READING = frozenset({Tensor.tolist, Tensor.numpy, Tensor.cpu})


class Operations(TorchDispatchMode):
    """Counts every operation by name. A foreach operation counts once, however many tensors it updates."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self.calls: Counter[str] = Counter()
        self.views = 0

    @property
    def total(self) -> int:
        """All operations so far."""
        return self.calls.total()

    @property
    def kernels(self) -> int:
        """Operations that are not views: on a GPU, roughly the number of kernel launches."""
        return self.total - self.views

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.calls[str(func)] += 1
        self.views += func.is_view
        return func(*args, **(kwargs or {}))


class Waits:
    """Counts host waits: values read, masks converted to indices, tensors copied to lists."""

    def __init__(self) -> None:
        self.total = 0
        self._modes = (_WaitingOperations(self), _ReadingCalls(self))

    def __enter__(self) -> "Waits":
        for mode in self._modes:
            mode.__enter__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)  # type: ignore[no-untyped-call]  # torch leaves it unannotated


class _WaitingOperations(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self.waits = waits

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.waits.total += func in _WAITING or _indexes_by_mask(func, args) or _asks_for_size(func, kwargs)
        return func(*args, **(kwargs or {}))


class _ReadingCalls(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.waits.total += func in _READING
        return func(*args, **(kwargs or {}))


def _asks_for_size(func: Any, kwargs: Mapping[str, Any] | None) -> bool:
    """Whether the size of the result is read from the device, because the caller did not pass it."""
    return func is aten.repeat_interleave.Tensor and (kwargs or {}).get("output_size") is None


def _indexes_by_mask(func: Any, args: tuple[Any, ...]) -> bool:
    if func not in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        return False
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def count(call: Callable[[], object]) -> Operations:
    """The operations of one call."""
    operations = Operations()
    with operations:
        call()
    return operations
