"""Bytes: those that live tensors hold, and the most that were live at once during a call."""

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
    """What all tensors of the process hold that Python can reach, shared storages counted once.

    Whoever keeps them: a method hides nothing in a list, a closure or an optimizer. Gradients nobody looked at are no
    Python objects, so take it between steps.
    """
    for _ in range(3):  # what finalizers of one collection let go, the next one finds
        gc.collect()
    tensors = [found for found in gc.get_objects() if issubclass(type(found), Tensor) and not is_lazy(found)]
    # Sparse tensors have no storage of their own, nor have what vmap and grad wrap around others while they run.
    own = [tensor.untyped_storage() for tensor in tensors if torch._C._has_storage(tensor)]
    storages = {storage._cdata: storage.nbytes() for storage in own}
    return sum(storages.values())


class Storages(TorchDispatchMode):
    """Follows the storages that operations make, until they are freed. Scratch space inside a kernel isn't seen."""

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
        # What came in and goes out again, a view's or an in-place result's storage, was noted before or is older.
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
    """The most that was live at once during ``call`` beyond what was live before."""
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
