"""A barrier before an engine's collectives, and at steps, which detects ranks at different points of the training.

If one rank skips a backward, the collectives of DDP, FSDP2 or DeepSpeed deadlock and cannot be interrupted. The barrier
runs before them, in a gloo group on the host. It compares the ranks' positions, and raises on every rank if they
differ.
"""

import atexit
import os
import warnings
from collections.abc import Iterable
from datetime import timedelta
from functools import partial
from typing import Any, Final
from weakref import WeakKeyDictionary, WeakSet

import attrs
import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from tunerkit.errors import TunerkitWarning
from tunerkit.plugin.engines import Removable
from tunerkit_distributed import group, torch_private
from tunerkit_distributed.outputs import tensors_in
from tunerkit_distributed.position import Position

_WHAT: Final = "the others, at a forward, a backward or a step"
_FORWARD: Final = 8  # what a forward adds to `Position.part`, where a backward adds 1
_AGREEMENT: Final = 4  # what a broadcast from rank 0 adds to it
_FOR_EVER: Final = 1e8  # seconds, three years: torch takes no infinite ones


@attrs.define(eq=False)
class _HostGroup:
    """A process group on the host, only for barriers, which can run while collectives of the engine are in progress.

    Attributes:
        group: The gloo group.
        last: The number of the backward with the last barrier; all models in a backward share one barrier.
        process: The id of the process that created the group; a forked process does not have the group's threads.
        counters: The counters of each trained model.
    """

    group: Any
    last: int = -1
    process: int = attrs.field(factory=os.getpid)
    counters: WeakKeyDictionary[nn.Module, "_Counters"] = attrs.field(factory=WeakKeyDictionary)


@attrs.define(eq=False)
class _Counters:
    """The position of one model's training, shared by the engines that train its adapters.

    Attributes:
        training: The number of the first training of the model.
        names: The adapters' names.
        steps, forwards, backwards: The number of steps, and of forwards and backwards since the last step.
        synced: The number of backwards with a barrier.
        last: The number of the last backward.
        seen: The value of ``synced`` at the last step of each optimizer.
    """

    training: int
    names: list[str] = attrs.field(factory=list)
    steps: int = 0
    forwards: int = 0
    backwards: int = 0
    synced: int = 0
    last: int = -1
    seen: WeakKeyDictionary[Optimizer, int] = attrs.field(factory=WeakKeyDictionary)


_host_groups: WeakKeyDictionary[Any, _HostGroup | None] = WeakKeyDictionary()  # by the default group
_opened: WeakSet[_HostGroup] = WeakSet()  # all of them: a barrier may outlive the default group of its own


class Barrier:
    """The barrier for the adapters that one engine trains. Before `open_`, it does nothing.

    A copy or pickle of an open barrier is not open, since no optimizer drives the copied model.
    """

    def __init__(self) -> None:
        self._host: _HostGroup | None = None
        self._counters = _Counters(0)
        self._names: list[str] = []
        self._hooks: list[Removable] = []
        self._watched: WeakSet[nn.Module] = WeakSet()

    def __reduce__(self) -> "tuple[type[Barrier], tuple[()]]":
        return Barrier, ()

    def open_(self, names: Iterable[str], model: nn.Module, training: int) -> dict[str, "_Membership"]:
        """Add adapters to the barrier. All ranks must call this, in the same order.

        Args:
            names: The adapters' names.
            model: The wrapped model.
            training: The number of the training.

        Returns:
            The handle of each adapter, by name. Once all are removed, the barrier does nothing.
        """
        names = list(names)
        self._host = _host_group()
        if self._host is not None:
            self._counters = self._host.counters.setdefault(model, _Counters(training))
        self._names += names
        self._counters.names += names
        return {name: _Membership(self, name) for name in names}

    def leave_(self, name: str) -> None:
        """Remove an adapter; the last one closes the barrier."""
        if name in self._names:
            self._names.remove(name)
            self._counters.names.remove(name)
        if not self._names:
            self._host = None
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()
            self._watched.clear()

    def keep_(self, hook: Removable) -> None:
        """Keep a hook until the last adapter is removed, then remove the hook."""
        self._hooks.append(hook)

    def watch_(self, model: nn.Module, *, forwards: bool) -> None:
        """Register hooks that run the barrier at the beginning of each backward through the model's output.

        Args:
            model: The model that runs.
            forwards: Whether to run the barrier in forwards with gradients too, since the engine has collectives there.
        """
        if self._host is not None and model not in self._watched:
            self._watched.add(model)
            self.keep_(model.register_forward_hook(partial(_mark, self), prepend=True))
            if forwards:
                self.keep_(model.register_forward_pre_hook(partial(_enter, self), prepend=True))

    def at_forward(self) -> None:
        """Wait for all ranks at the beginning of a forward. Raises `StepError` on every rank if positions differ."""
        self._counters.forwards += 1
        self._wait(f"forward {self._counters.forwards}")

    def at_backward(self, *, exchanged: bool = True) -> None:
        """Wait for all ranks, once in the running backward. Raises like `at_forward`.

        Args:
            exchanged: Whether the engine reduces gradients in this backward. If not, count it without waiting.
        """
        running, counters = torch_private.running_backward(), self._counters
        if self._host is None or running == counters.last:
            return
        counters.last = running
        counters.backwards += 1
        if not exchanged:
            return
        counters.synced += 1
        if self._host.last != running:
            self._host.last = running
            self._wait(f"backward {counters.backwards}")

    def before_step_(self, optimizer: Optimizer, *, always: bool = False) -> None:
        """Wait for all ranks if no backward has had a barrier since the last step. Raises like `at_forward`.

        Args:
            optimizer: The optimizer that is about to step.
            always: Whether to wait in any case, because the step itself has collectives.
        """
        counters = self._counters
        if always or counters.seen.get(optimizer, 0) == counters.synced:
            after = f"after backward {counters.backwards}" if counters.backwards else "without a backward"
            self._wait(f"and it steps {after}", stepping=True)
        counters.seen[optimizer] = counters.synced
        counters.steps, counters.forwards, counters.backwards = counters.steps + 1, 0, 0

    def before_agreeing(self, what: str) -> None:
        """Wait for all ranks before a broadcast from rank 0. Raises like `at_forward`.

        Args:
            what: The name of the tensors in messages.
        """
        self._wait(f"waiting for {what}", stepping=True, more=_AGREEMENT)

    def _wait(self, doing: str, *, stepping: bool = False, more: int = 0) -> None:
        host, counters = self._host, self._counters
        if host is None or not _is_open(host):
            return
        part = counters.backwards + _FORWARD * counters.forwards + more
        position = Position(counters.steps, part, stepping, counters.training, counters.names, doing)
        numbers = torch.tensor(position.numbers())
        group.reduce_(numbers, _WHAT, host.group)
        position.refuse_mismatch(numbers.tolist(), host.group)


@attrs.frozen(eq=False)
class _Membership:
    """The handle of one adapter in a barrier."""

    barrier: Barrier
    name: str

    def remove(self) -> None:
        """Remove the adapter from the barrier."""
        self.barrier.leave_(self.name)


def _enter(barrier: Barrier, model: nn.Module, args: Any) -> None:
    """Forward pre-hook: run the barrier, unless gradients are off or a backward recomputes this forward."""
    if not torch.compiler.is_compiling() and torch.is_grad_enabled() and torch_private.running_backward() == -1:
        barrier.at_forward()


def _mark(barrier: Barrier, model: nn.Module, args: Any, output: Any) -> None:
    """Forward hook: register the barrier on ``output``, to run in backward before the hooks of FSDP2."""
    if not torch.compiler.is_compiling():
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                torch_private.hook_first_(tensor, partial(_arrive, barrier))


def _arrive(barrier: Barrier, gradient: Tensor) -> None:
    barrier.at_backward()


def _is_open(host: _HostGroup) -> bool:
    """Whether the default process group of ``host`` still exists; without it, this process runs alone."""
    default = distributed.group.WORLD
    return default is not None and _host_groups.get(default) is host


def _host_group() -> _HostGroup | None:
    """Return the default process group's host group, created by the first call on all ranks; None without gloo."""
    if not group.in_group():
        return None
    default = distributed.group.WORLD
    if default not in _host_groups:
        _host_groups[default] = _new_host_group() if distributed.is_gloo_available() else None
    return _host_groups[default]


@atexit.register
def _close_() -> None:
    """End the threads of this process's CPU (gloo) groups before the interpreter shuts down.

    A thread that frees a tensor during the shutdown aborts the process (pytorch/pytorch#179291).
    """
    mine = [host for host in _opened if host.process == os.getpid()]
    listed = [host for host in mine if _is_open(host)]
    if mine:
        _host_groups.clear()
        _opened.clear()
    for host in listed:
        distributed.destroy_process_group(host.group)
    for host in mine:
        host.group = None  # the last reference, unless an uncaught error holds one


def _new_host_group() -> _HostGroup | None:
    """Create a host group; return None on every rank if any rank fails, for example without a network for gloo."""
    try:
        limit = timedelta(seconds=min(group.limit() + 60, _FOR_EVER))  # later than the limit in `group`
        host, reason = _HostGroup(distributed.new_group(backend="gloo", timeout=limit)), ""
    except RuntimeError as error:
        host, reason = None, str(error)
    opened = torch.tensor([float(host is not None)], device=group.device())
    group.reduce_(opened, "the process group on the host")
    if host is not None and opened.item() == group.processes():
        _opened.add(host)
        return host
    warnings.warn(
        "no process group on the host (gloo) could be created, so if a process skips a backward, the collectives of "
        f"DDP, FSDP2 or DeepSpeed deadlock without an error{f': {reason}' if reason else ''}",
        TunerkitWarning,
        stacklevel=2,
    )
    return None
