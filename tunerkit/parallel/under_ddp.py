"""Meetings under DistributedDataParallel, which launches its all-reduces during a backward and waits at its end."""

import weakref
from collections.abc import Callable, Iterable, Sequence

from torch import nn
from torch.optim import Optimizer

from tunerkit.libraries import torch_private
from tunerkit.parallel.engine import Removable
from tunerkit.parallel.meeting import Meeting


class UnderDdp:
    """The processes meet at the first gradient of each backward in which DDP averages, before DDP waits.

    So compiled models meet too, and parts that are called by hand. A gradient that `torch.autograd.grad` returns needs
    no meeting. Inside DDP's ``join``, where processes may run out of data, there is none.

    Args:
        find: Returns each DDP around the models. It takes long, so it is called once.
    """

    def __init__(self, find: Callable[[], Sequence[nn.parallel.DistributedDataParallel]]) -> None:
        self._find = find
        self._meeting = Meeting()
        self._found: weakref.ref[nn.parallel.DistributedDataParallel] | None = None

    def open_(self, names: Iterable[str]) -> dict[str, Removable]:
        """Take part. See `Meeting.open_`."""
        return {**self._meeting.open_(names)}

    def at_backward(self) -> None:
        """Meet, once in the backward that is running. See `Meeting.at_backward`."""
        ddp = self._ddp()
        if ddp is not None and not torch_private.is_joining(ddp):
            self._meeting.at_backward(exchanged=bool(ddp.require_backward_grad_sync))

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
        return found
