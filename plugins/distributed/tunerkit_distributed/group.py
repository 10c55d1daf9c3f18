"""The process group of a training, and waiting for the others in it without waiting for ever.

A process that waits long writes down for what, where all can read it. If another one waits for something else, neither
will ever go on: both raise an error then. A process that is busy, with an evaluation or a file, is waited for.
"""

import json
import math
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, distributed

from tunerkit.errors import ConfigError, StepError, shown
from tunerkit_distributed import torch_private

Value = TypeVar("Value")
# Environment variables, with their defaults: the seconds after which waiting ends (as torch's own for gloo), and after
# which a process writes down where it waits, and looks where the others do.
_LIMIT: Final = ("TUNERKIT_COLLECTIVE_SECONDS", 1800.0)
_LOOK: Final = ("TUNERKIT_LOOK_SECONDS", 10.0)
_BRIEFLY: Final = 0.05
_PLACES: Final = "tunerkit/waiting/"
_written: set[int] = set()  # this process's number, while it has written down where it waits


def is_formed() -> bool:
    """Whether there is a process group, of several or of this process alone."""
    return distributed.is_available() and distributed.is_initialized()


def in_group() -> bool:
    """Whether this process belongs to a process group of several."""
    return is_formed() and distributed.get_world_size() > 1


def is_launched() -> bool:
    """Whether this process is one of several, also if they have formed no group yet: a launcher says so."""
    return in_group() or os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def is_alone() -> bool:
    """Whether nothing says that there are, or may be, other processes: no process group, also of one, and no launcher.

    In a process group of one, there may be a DistributedDataParallel around the model.
    """
    return not is_formed() and not is_launched()


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if in_group() else 0


def processes() -> int:
    """The number of processes."""
    return distributed.get_world_size() if in_group() else 1


def reduce_(tensor: Tensor, what: str, within: Any = None) -> None:
    """Replace ``tensor`` by its sum over all processes.

    Args:
        tensor: The tensor, of the same shape in all processes.
        what: What is added up, for messages.
        within: The process group; None for the default one.

    Raises:
        StepError: Another process is lost, or waits for something else.
    """
    _await(lambda: distributed.all_reduce(tensor, group=within, async_op=True), tensor, what)


def broadcast_(tensor: Tensor, what: str) -> None:
    """Replace ``tensor`` by that of process 0. Raises like `reduce_`."""
    _await(lambda: distributed.broadcast(tensor, src=0, async_op=True), tensor, what)


def gather(tensor: Tensor, what: str, within: Any = None) -> list[Tensor]:
    """Return the ``tensor`` of each process, by its number; all have one shape. Raises like `reduce_`.

    Args:
        tensor: This process's.
        what: What is gathered, for messages.
        within: The process group; None for the default one.
    """
    found = [torch.empty_like(tensor) for _ in range(distributed.get_world_size(within))]
    _await(lambda: distributed.all_gather(found, tensor, group=within, async_op=True), tensor, what)
    return found


def gather_text(text: str, what: str, within: Any = None) -> list[str]:
    """Return the ``text`` of each process, by its number, in two collectives. See `gather`."""
    place = device(within)
    own = torch.frombuffer(bytearray(text.encode()) or bytearray(1), dtype=torch.uint8).to(place)
    lengths = [int(length) for length in gather(torch.tensor([len(text.encode())], device=place), what, within)]
    padded = torch.zeros(max(*lengths, 1), dtype=torch.uint8, device=place)
    padded[: len(own)] = own
    found = gather(padded, what, within)
    return [bytes(each[:length].tolist()).decode() for each, length in zip(found, lengths, strict=True)]


def wait_until(found: Callable[[], Value | None], what: str) -> Value:
    """Call ``found`` until it returns something. Raises like `reduce_`.

    Args:
        found: Looks for what another process does. It must return quickly.
        what: What is waited for, for messages.
    """
    _forget_place()
    look = _seconds(*_LOOK)
    started = looked = time.monotonic()
    while (answer := found()) is None:
        time.sleep(_BRIEFLY)
        if time.monotonic() - looked > look:
            looked = time.monotonic()
            _look_around(what, looked - started)
    _forget_place()
    return answer


def limit() -> float:
    """The seconds after which waiting for the other processes ends."""
    return _seconds(*_LIMIT)


def device(within: Any = None) -> torch.device:
    """Where a group's collectives take tensors from: the CPU if they do, else this process's accelerator."""
    kinds = dict(each.split(":") for each in str(distributed.get_backend_config(within)).split(","))
    found = None if "cpu" in kinds else torch.accelerator.current_accelerator()
    return torch.device("cpu") if found is None else torch.device(found.type, torch.accelerator.current_device_index())


def _await(call: Callable[[], Any], tensor: Tensor, what: str) -> None:
    _forget_place()
    started = time.monotonic()
    try:
        work = call()
        if tensor.device.type != "cpu":
            work.wait()  # the device waits, not the host; the group's own time limit holds
            return
        while True:
            try:
                work.wait(timedelta(seconds=_seconds(*_LOOK)))
                _forget_place()
                return
            except RuntimeError:
                if work.is_completed():
                    raise
            _look_around(what, time.monotonic() - started)
    except RuntimeError as error:
        raise StepError(
            f"process {rank()} of {processes()} lost another one while it waited for {what}: the error of the process "
            f"that ended first says why ({shown(str(error))})"
        ) from error


def _look_around(what: str, waited: float) -> None:
    """Write down where this process waits. Raise `StepError` if another one waits elsewhere, or the limit is over."""
    store, own = torch_private.default_store(), rank()
    store.set(f"{_PLACES}{own}", json.dumps(what))
    _written.add(own)
    for other in range(processes()):
        key = f"{_PLACES}{other}"
        place = json.loads(store.get(key)) if other != own and store.check([key]) else None
        if place not in (None, what):
            raise StepError(
                f"process {own} waits for {what}, and process {other} for {place}: they are not at the same point of "
                "the training. Every process must take every step, with a backward in each, and save where all do"
            )
    if waited > limit():
        raise StepError(
            f"process {own} waited {waited:.0f} seconds for {what}, and another one of {processes()} did not come. "
            f"Every process must take every step, with a backward in each; {_LIMIT[0]} sets the limit"
        )


def _forget_place() -> None:
    """Take back what `_look_around` wrote down. After an error it stays until the next wait, for the others to see."""
    if rank() in _written:
        _written.discard(rank())
        torch_private.default_store().set(f"{_PLACES}{rank()}", json.dumps(None))


def _seconds(name: str, default: float) -> float:
    given = os.environ.get(name, "")
    try:
        seconds = float(given) if given else default
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise ConfigError([f"expected a number of seconds above 0, got {given!r} @ {name}"])
    return seconds
