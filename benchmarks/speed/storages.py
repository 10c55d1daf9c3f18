"""Bytes that live tensors hold, and the peak of live bytes during a call."""

import gc
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def held_bytes() -> int:
    """Bytes of all tensors of the process that Python can reach; shared storages count once.

    It finds tensors wherever they are kept: in a list, a closure or an optimizer. Gradients that nobody accessed are
    not Python objects, so call it between steps.
    """
    for _ in range(3):  # finalizers of one collection free objects that only the next collection finds
        gc.collect()
    tensors = [found for found in gc.get_objects() if issubclass(type(found), Tensor) and not is_lazy(found)]
    # Sparse tensors have no storage, nor have the wrapper tensors of vmap and grad while they run.
    own = [tensor.untyped_storage() for tensor in tensors if torch._C._has_storage(tensor)]
    storages = {storage._cdata: storage.nbytes() for storage in own}
    return sum(storages.values())


class Storages(TorchDispatchMode):
    """Tracks storages that operations allocate until they are freed. Scratch space inside kernels is not tracked."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage(), given)
        return found

    def _note(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        # The storage of a view or an in-place result is an input's: it is tracked already, or existed before.
        key = storage._cdata
        if key in self._sizes or key in given:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The peak of live bytes during ``call``, beyond those live before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    storages = Storages()
    with storages:
        call()
    return storages.peak
