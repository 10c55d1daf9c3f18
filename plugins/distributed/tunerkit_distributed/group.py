"""The process group of a training: collectives that detect deadlocks.

A rank that waits long publishes in the group's store what it is waiting for. If another rank waits for something else,
the two are deadlocked, and both raise. A rank that is busy, as with an evaluation, publishes nothing: others wait.
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
# Environment variables, with their defaults: the timeout in seconds (torch's own for gloo), and the seconds after which
# a rank publishes what it waits for, and looks at the others.
_LIMIT: Final = ("TUNERKIT_COLLECTIVE_SECONDS", 1800.0)
_LOOK: Final = ("TUNERKIT_LOOK_SECONDS", 10.0)
_BRIEFLY: Final = 0.05
_WAITS: Final = "tunerkit/waiting/"
_written: set[int] = set()  # this rank, while it has published what it waits for


def is_formed() -> bool:
    """Whether there is a process group, even of a single process."""
    return distributed.is_available() and distributed.is_initialized()


def in_group() -> bool:
    """Whether this process belongs to a process group of several ranks."""
    return is_formed() and distributed.get_world_size() > 1


def is_launched() -> bool:
    """Whether this process is one of several, by the process group or a launcher's environment variables."""
    return in_group() or os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def rank() -> int:
    """The rank of this process."""
    return distributed.get_rank() if in_group() else 0


def processes() -> int:
    """The number of ranks."""
    return distributed.get_world_size() if in_group() else 1


def reduce_(tensor: Tensor, what: str, within: Any = None) -> None:
    """Replace ``tensor`` by its sum over all ranks.

    Args:
        tensor: The tensor, of the same shape on all ranks.
        what: The tensor's name in messages.
        within: The process group; None for the default one.

    Raises:
        StepError: Another rank has ended, waits for something else, or does not arrive in time.
    """
    _await(lambda: distributed.all_reduce(tensor, group=within, async_op=True), tensor, what)


def broadcast_(tensor: Tensor, what: str) -> None:
    """Overwrite ``tensor`` with rank 0's values. Raises like `reduce_`."""
    _await(lambda: distributed.broadcast(tensor, src=0, async_op=True), tensor, what)


def gather(tensor: Tensor, what: str, within: Any = None) -> list[Tensor]:
    """Return the tensors of all ranks, in rank order. Raises like `reduce_`.

    Args:
        tensor: This rank's tensor, of the same shape on all ranks.
        what: The tensor's name in messages.
        within: The process group; None for the default one.
    """
    found = [torch.empty_like(tensor) for _ in range(distributed.get_world_size(within))]
    _await(lambda: distributed.all_gather(found, tensor, group=within, async_op=True), tensor, what)
    return found


def gather_text(text: str, what: str, within: Any = None) -> list[str]:
    """Return the texts of all ranks, in rank order, with two collectives. See `gather`."""
    place = device(within)
    own = torch.frombuffer(bytearray(text.encode()) or bytearray(1), dtype=torch.uint8).to(place)
    lengths = [int(length) for length in gather(torch.tensor([len(text.encode())], device=place), what, within)]
    padded = torch.zeros(max(*lengths, 1), dtype=torch.uint8, device=place)
    padded[: len(own)] = own
    found = gather(padded, what, within)
    return [bytes(each[:length].tolist()).decode() for each, length in zip(found, lengths, strict=True)]


def wait_until(found: Callable[[], Value | None], what: str) -> Value:
    """Call ``found`` until it returns a value other than None, and return that. Raises like `reduce_`.

    Args:
        found: Checks without waiting whether another rank has done something.
        what: The name of the other rank's action in messages.
    """
    _forget_wait()
    look = _seconds(*_LOOK)
    started = looked = time.monotonic()
    while (answer := found()) is None:
        time.sleep(_BRIEFLY)
        if time.monotonic() - looked > look:
            looked = time.monotonic()
            _look_around(what, looked - started)
    _forget_wait()
    return answer


def limit() -> float:
    """Return the timeout in seconds for waiting for other ranks."""
    return _seconds(*_LIMIT)


def device(within: Any = None) -> torch.device:
    """Return the device of a group's collectives: the CPU if supported, else this process's accelerator."""
    kinds = dict(each.split(":") for each in str(distributed.get_backend_config(within)).split(","))
    found = None if "cpu" in kinds else torch.accelerator.current_accelerator()
    return torch.device("cpu") if found is None else torch.device(found.type, torch.accelerator.current_device_index())


def _await(call: Callable[[], Any], tensor: Tensor, what: str) -> None:
    _forget_wait()
    started = time.monotonic()
    try:
        work = call()
        if tensor.device.type != "cpu":
            work.wait()  # the device waits, not the host; the group's own time limit holds
            return
        while True:
            try:
                work.wait(timedelta(seconds=_seconds(*_LOOK)))
                _forget_wait()
                return
            except RuntimeError:
                if work.is_completed():
                    raise
            _look_around(what, time.monotonic() - started)
    except RuntimeError as error:
        raise StepError(
            f"process {rank()} of {processes()} lost another one while it waited for {what}: see the error of the "
            f"process that ended first ({shown(str(error))})"
        ) from error


def _look_around(what: str, waited: float) -> None:
    """Publish what this rank waits for. Raises `StepError` on a timeout, or if another rank waits for another thing."""
    store, own = torch_private.default_store(), rank()
    store.set(f"{_WAITS}{own}", json.dumps(what))
    _written.add(own)
    for other in range(processes()):
        key = f"{_WAITS}{other}"
        place = json.loads(store.get(key)) if other != own and store.check([key]) else None
        if place not in (None, what):
            raise StepError(
                f"process {own} waits for {what}, and process {other} for {place}: they are not at the same point of "
                "the training. Every process must take every step, with a backward in each, and save at the same points"
            )
    if waited > limit():
        raise StepError(
            f"process {own} waited {waited:.0f} seconds for {what}, but not all {processes()} processes arrived. Every "
            f"process must take every step, with a backward in each; {_LIMIT[0]} sets the limit"
        )


def _forget_wait() -> None:
    """Withdraw what `_look_around` published. After an error it stays published, so that other ranks see it."""
    if rank() in _written:
        _written.discard(rank())
        torch_private.default_store().set(f"{_WAITS}{rank()}", json.dumps(None))


def _seconds(name: str, default: float) -> float:
    given = os.environ.get(name, "")
    try:
        seconds = float(given) if given else default
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise ConfigError([f"expected a number of seconds above 0, got {given!r} @ {name}"])
    return seconds
