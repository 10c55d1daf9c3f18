"""Meetings under DistributedDataParallel, which launches its all-reduces during a backward and waits at its end."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from tunerkit.hooks import Removable
from tunerkit_distributed import torch_private
from tunerkit_distributed.meeting import Meeting


class UnderDdp:
    """The processes meet at the first gradient of each backward in which DDP averages, before DDP waits.

    So compiled models meet too, and parts that are called by hand. DDP averages in the first backward after a forward
    of its own; a backward of the model inside alone, in one process, is no business of the others. A gradient that
    `torch.autograd.grad` returns needs no meeting. Inside DDP's ``join``, where processes may run out of data, there is
    none.

    Args:
        find: Returns each DDP around the models. It takes long, so it is called once, and again if that DDP is gone.
    """

    def __init__(self, find: Callable[[], Sequence[nn.parallel.DistributedDataParallel]]) -> None:
        self._find = find
        self._meeting = Meeting()
        self._found: weakref.ref[nn.parallel.DistributedDataParallel] | None = None
        self._is_due = False

    def __reduce__(self) -> "tuple[type[UnderDdp], tuple[Any]]":
        return UnderDdp, (tuple,)

    def open_(self, names: Iterable[str], model: nn.Module, training: int) -> dict[str, Removable]:
        """Take part. See `Meeting.open_`."""
        self._ddp()
        return {**self._meeting.open_(names, model, training)}

    def is_there(self) -> bool:
        """Whether there is a DDP around the model, still or again."""
        return self._ddp() is not None

    def at_backward(self) -> None:
        """Meet, once in the backward that is running. See `Meeting.at_backward`."""
        ddp = self._ddp()
        if ddp is None or torch_private.is_joining(ddp):
            return
        if not ddp.require_backward_grad_sync:
            self._meeting.at_backward(exchanged=False)
        elif self._is_due:
            self._is_due = False
            self._meeting.at_backward()

    def before_step_(self, optimizer: Optimizer) -> None:
        """Meet, if no backward has met since the last step. See `Meeting.before_step_`."""
        ddp = self._ddp()
        if ddp is not None and not torch_private.is_joining(ddp):
            self._meeting.before_step_(optimizer)

    def before_agreeing(self, what: str) -> None:
        """Meet before all take something from process 0. See `Meeting.before_agreeing`."""
        ddp = self._ddp()
        if ddp is not None and not torch_private.is_joining(ddp):
            self._meeting.before_agreeing(what)

    def _ddp(self) -> nn.parallel.DistributedDataParallel | None:
        """The DDP around a model, as long as it lives."""
        found = None if self._found is None else self._found()
        if found is None:
            found = next(iter(self._find()), None)
            self._found = None if found is None else weakref.ref(found)
            if found is not None:
                self._meeting.keep_(found.register_forward_pre_hook(self._before_forward))
            self._is_due = torch_private.running_backward() >= 0  # then its forward was before this hook
        return found

    def _before_forward(self, ddp: nn.parallel.DistributedDataParallel, args: Any) -> None:
        """Note that a backward is due; meet before DDP exchanges buffers, as those of a language model's positions."""
        if torch.is_grad_enabled() and ddp.require_backward_grad_sync and not torch_private.is_joining(ddp):
            self._is_due = True
            if ddp.will_sync_module_buffers() and not torch.compiler.is_compiling():
                self._meeting.at_forward()
