"""The barrier under DistributedDataParallel, which launches all-reduces during a backward and waits at its end."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from tunerkit.plugin.engines import Removable
from tunerkit_distributed import torch_private
from tunerkit_distributed.barrier import Barrier


class UnderDdp:
    """Runs a barrier at the first gradient of each backward in which DDP averages, before DDP's own wait.

    The caller's hooks on parameters also cover compiled models and parts that are called directly. DDP averages only in
    the first backward after DDP's forward, so backwards of the inner model need no barrier, and neither does
    `torch.autograd.grad`. Inside DDP's ``join``, where ranks may run out of data, there is no barrier.

    Args:
        find: Returns each DDP around the models. It is slow, so it is called again only if no DDP is known.
    """

    def __init__(self, find: Callable[[], Sequence[nn.parallel.DistributedDataParallel]]) -> None:
        self._find = find
        self._barrier = Barrier()
        self._found: weakref.ref[nn.parallel.DistributedDataParallel] | None = None
        self._is_due = False

    def __reduce__(self) -> "tuple[type[UnderDdp], tuple[Any]]":
        return UnderDdp, (tuple,)

    def open_(self, names: Iterable[str], model: nn.Module, training: int) -> dict[str, Removable]:
        """Add adapters to the barrier. See `Barrier.open_`."""
        self._ddp()
        return {**self._barrier.open_(names, model, training)}

    def is_there(self) -> bool:
        """Whether there is a DDP around the model now."""
        return self._ddp() is not None

    def at_backward(self) -> None:
        """Wait for all ranks at the first gradient of a backward, if DDP averages. See `Barrier.at_backward`."""
        ddp = self._ddp()
        if ddp is None or torch_private.is_joining(ddp):
            return
        if not ddp.require_backward_grad_sync:
            self._barrier.at_backward(exchanged=False)
        elif self._is_due:
            self._is_due = False
            self._barrier.at_backward()

    def before_step_(self, optimizer: Optimizer) -> None:
        """Wait for all ranks if no backward has had a barrier since the last step. See `Barrier.before_step_`."""
        ddp = self._ddp()
        if ddp is not None and not torch_private.is_joining(ddp):
            self._barrier.before_step_(optimizer)

    def before_agreeing(self, what: str) -> None:
        """Wait for all ranks before a broadcast from rank 0. See `Barrier.before_agreeing`."""
        ddp = self._ddp()
        if ddp is not None and not torch_private.is_joining(ddp):
            self._barrier.before_agreeing(what)

    def _ddp(self) -> nn.parallel.DistributedDataParallel | None:
        """Return the DDP around the models, found once and again if it was freed; hook its forward."""
        found = None if self._found is None else self._found()
        if found is None:
            found = next(iter(self._find()), None)
            self._found = None if found is None else weakref.ref(found)
            if found is not None:
                self._barrier.keep_(found.register_forward_pre_hook(self._before_forward))
            self._is_due = torch_private.running_backward() >= 0  # its forward preceded this hook
        return found

    def _before_forward(self, ddp: nn.parallel.DistributedDataParallel, args: Any) -> None:
        """Note that the next backward averages, and wait for all processes if DDP sends buffers."""
        if torch.is_grad_enabled() and ddp.require_backward_grad_sync and not torch_private.is_joining(ddp):
            self._is_due = True
            if ddp.will_sync_module_buffers() and not torch.compiler.is_compiling():
                self._barrier.at_forward()
