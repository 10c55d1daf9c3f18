"""Where the processes of a training meet if the engine has exchanges of its own: before these, and at steps.

An engine that waits for a process which skips a backward waits for ever, and nothing can end that. So the processes
meet before it begins to wait. One is then at a backward, another one at a step, and all of them are told.
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
from tunerkit.hooks import Removable
from tunerkit_distributed import group, torch_private
from tunerkit_distributed.outputs import tensors_in
from tunerkit_distributed.place import Place

_WHAT: Final = "the others, at a forward, a backward or a step"
_FORWARD: Final = 8  # what a forward adds to `Place.part`, where a backward adds 1
_AGREEMENT: Final = 4  # what an agreement adds to it
_FOR_EVER: Final = 1e8  # seconds, three years: torch takes no infinite ones


@attrs.define(eq=False)
class _Room:
    """A process group on the host, for meetings alone, so that it works while the engine's exchanges are under way.

    ``last`` is the number of the backward at which the processes met last: there is one meeting, however many adapters,
    optimizers and models take part in it. ``courses`` are the trainings, by the model. ``process`` is the one that
    opened it: a fork has no threads to wait for.
    """

    group: Any
    last: int = -1
    process: int = attrs.field(factory=os.getpid)
    courses: WeakKeyDictionary[nn.Module, "_Course"] = attrs.field(factory=WeakKeyDictionary)


@attrs.define(eq=False)
class _Course:
    """How far the training of one model is, for all engines that train its adapters.

    ``training`` is the number of the first one, ``last`` that of the last backward. ``met`` counts the backwards in
    which the processes met, and ``seen`` how many of them there were at the last step of each optimizer.
    """

    training: int
    names: list[str] = attrs.field(factory=list)
    steps: int = 0
    forwards: int = 0
    backwards: int = 0
    met: int = 0
    last: int = -1
    seen: WeakKeyDictionary[Optimizer, int] = attrs.field(factory=WeakKeyDictionary)


_rooms: WeakKeyDictionary[Any, _Room | None] = WeakKeyDictionary()  # by the default group
_opened: WeakSet[_Room] = WeakSet()  # all of them: a meeting may hold one whose default group is gone


class Meeting:
    """The meetings of the adapters that one engine trains. Without `open_` nothing happens.

    A copy or a pickle of the model holds one that was not opened: no optimizer drives the copy.
    """

    def __init__(self) -> None:
        self._room: _Room | None = None
        self._course = _Course(0)
        self._names: list[str] = []
        self._hooks: list[Removable] = []
        self._watched: WeakSet[nn.Module] = WeakSet()

    def __reduce__(self) -> "tuple[type[Meeting], tuple[()]]":
        return Meeting, ()

    def open_(self, names: Iterable[str], model: nn.Module, training: int) -> dict[str, "_Seat"]:
        """Take part from now on, with these adapters too. All processes must call this, in the same order.

        Args:
            names: The adapters.
            model: The wrapped model.
            training: The number of the training.

        Returns:
            The handle of each, by its name. Once all are removed, nothing happens any more.
        """
        names = list(names)
        self._room = _room()
        if self._room is not None:
            self._course = self._room.courses.setdefault(model, _Course(training))
        self._names += names
        self._course.names += names
        return {name: _Seat(self, name) for name in names}

    def leave_(self, name: str) -> None:
        """Go on without one of the adapters."""
        if name in self._names:
            self._names.remove(name)
            self._course.names.remove(name)
        if not self._names:
            self._room = None
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()
            self._watched.clear()

    def keep_(self, hook: Removable) -> None:
        """Remove a hook once no adapter takes part any more."""
        self._hooks.append(hook)

    def watch_(self, model: nn.Module, *, forwards: bool) -> None:
        """Meet before anything else of each backward of what ``model`` returns.

        Args:
            model: The model that runs.
            forwards: Whether to meet at each forward with gradients too, since the engine exchanges there.
        """
        if self._room is not None and model not in self._watched:
            self._watched.add(model)
            self.keep_(model.register_forward_hook(partial(_mark, self), prepend=True))
            if forwards:
                self.keep_(model.register_forward_pre_hook(partial(_enter, self), prepend=True))

    def at_forward(self) -> None:
        """Meet, at the beginning of a forward. Raises `StepError` in every process if one is somewhere else."""
        self._course.forwards += 1
        self._meet(f"forward {self._course.forwards}")

    def at_backward(self, *, exchanged: bool = True) -> None:
        """Meet, once in the backward that is running. Raises like `at_forward`.

        Args:
            exchanged: Whether the engine exchanges gradients in it. If not, it is only counted.
        """
        running, course = torch_private.running_backward(), self._course
        if self._room is None or running == course.last:
            return
        course.last = running
        course.backwards += 1
        if not exchanged:
            return
        course.met += 1
        if self._room.last != running:
            self._room.last = running
            self._meet(f"backward {course.backwards}")

    def before_step_(self, optimizer: Optimizer, *, always: bool = False) -> None:
        """Meet, if no backward has met since the last step. Raises like `at_forward`.

        Args:
            optimizer: What is about to step.
            always: Whether to meet even so, since the step exchanges something.
        """
        course = self._course
        if always or course.seen.get(optimizer, 0) == course.met:
            after = f"after backward {course.backwards}" if course.backwards else "without a backward"
            self._meet(f"and it steps {after}", stepping=True)
        course.seen[optimizer] = course.met
        course.steps, course.forwards, course.backwards = course.steps + 1, 0, 0

    def before_agreeing(self, what: str) -> None:
        """Meet before all take something from process 0. Raises like `at_forward`.

        Args:
            what: What it is, for messages.
        """
        self._meet(f"waiting for {what}", stepping=True, more=_AGREEMENT)

    def _meet(self, doing: str, *, stepping: bool = False, more: int = 0) -> None:
        room, course = self._room, self._course
        if room is None or not _is_open(room):
            return
        part = course.backwards + _FORWARD * course.forwards + more
        place = Place(course.steps, part, stepping, course.training, course.names, doing)
        numbers = torch.tensor(place.numbers())
        group.reduce_(numbers, _WHAT, room.group)
        place.refuse_apart(numbers.tolist(), room.group)


@attrs.frozen(eq=False)
class _Seat:
    """The part of one adapter in the meetings."""

    meeting: Meeting
    name: str

    def remove(self) -> None:
        """End it."""
        self.meeting.leave_(self.name)


def _enter(meeting: Meeting, model: nn.Module, args: Any) -> None:
    """Meet before a forward that is followed by a backward, and is not repeated inside of one."""
    if not torch.compiler.is_compiling() and torch.is_grad_enabled() and torch_private.running_backward() == -1:
        meeting.at_forward()


def _mark(meeting: Meeting, model: nn.Module, args: Any, output: Any) -> None:
    """Have the backward of ``output`` meet first, also before what FSDP2 registered on it for the module inside."""
    if not torch.compiler.is_compiling():
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                torch_private.hook_first_(tensor, partial(_arrive, meeting))


def _arrive(meeting: Meeting, gradient: Tensor) -> None:
    meeting.at_backward()


def _is_open(room: _Room) -> bool:
    """Whether the process group of the training is still there. Without it this process goes on alone."""
    default = distributed.group.WORLD
    return default is not None and _rooms.get(default) is room


def _room() -> _Room | None:
    """The room of the default process group, which all processes open at the same time; None if there can be none."""
    if not group.in_group():
        return None
    default = distributed.group.WORLD
    if default not in _rooms:
        _rooms[default] = _new_room() if distributed.is_gloo_available() else None
    return _rooms[default]


@atexit.register
def _close_() -> None:
    """End the threads of all rooms while the interpreter runs.

    One that drops a tensor later, while the interpreter ends, aborts the process (pytorch/pytorch#179291).
    """
    mine = [room for room in _opened if room.process == os.getpid()]
    listed = [room for room in mine if _is_open(room)]
    if mine:
        _rooms.clear()
        _opened.clear()
    for room in listed:
        distributed.destroy_process_group(room.group)
    for room in mine:
        room.group = None  # the last reference, unless an error that nobody caught holds one


def _new_room() -> _Room | None:
    """A new room, if every process could open it: the host may have no network that gloo can use."""
    try:
        limit = timedelta(seconds=min(group.limit() + 60, _FOR_EVER))  # later than the one that `group` keeps
        room, reason = _Room(distributed.new_group(backend="gloo", timeout=limit)), ""
    except RuntimeError as error:
        room, reason = None, str(error)
    opened = torch.tensor([float(room is not None)], device=group.device())
    group.reduce_(opened, "the process group on the host")
    if room is not None and opened.item() == group.processes():
        _opened.add(room)
        return room
    warnings.warn(
        "no process group on the host (gloo) could be made, so a process that skips a backward is not noticed where "
        f"the engine has exchanges of its own{f': {reason}' if reason else ''}",
        TunerkitWarning,
        stacklevel=2,
    )
    return None
