"""The process group of a training: collectives that detect deadlocks.

A rank that waits long publishes in the group's store what it waits for. If another rank waits for something else, both
are deadlocked, and both raise. A rank that is busy, with an evaluation or a file, publishes nothing, so others wait.
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
    """Whether there is a process group, also one of a single process."""
    return distributed.is_available() and distributed.is_initialized()


def in_group() -> bool:
    """Whether this process belongs to a process group of several ranks."""
    return is_formed() and distributed.get_world_size() > 1


def is_launched() -> bool:
    """Whether this process is one of several, in a process group or by the environment that a launcher set."""
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
        what: Its name in messages.
        within: The process group; None for the default one.

    Raises:
        StepError: Another rank is lost, or waits for something else.
    """
    _await(lambda: distributed.all_reduce(tensor, group=within, async_op=True), tensor, what)


def broadcast_(tensor: Tensor, what: str) -> None:
    """Replace ``tensor`` by the one of rank 0. Raises like `reduce_`."""
    _await(lambda: distributed.broadcast(tensor, src=0, async_op=True), tensor, what)


def gather(tensor: Tensor, what: str, within: Any = None) -> list[Tensor]:
    """Return the tensors of all ranks, in their order; all have one shape. Raises like `reduce_`.

    Args:
        tensor: This rank's tensor.
        what: Its name in messages.
        within: The process group; None for the default one.
    """
    found = [torch.empty_like(tensor) for _ in range(distributed.get_world_size(within))]
    _await(lambda: distributed.all_gather(found, tensor, group=within, async_op=True), tensor, what)
    return found


def gather_text(text: str, what: str, within: Any = None) -> list[str]:
    """Return the texts of all ranks, in their order, in two collectives. See `gather`."""
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
        found: Polls for an action of another rank. It must return quickly.
        what: The name of that action in messages.
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
    """The timeout in seconds for waiting for other ranks."""
    return _seconds(*_LIMIT)


def device(within: Any = None) -> torch.device:
    """The device of a group's collectives: the CPU if they support it, else this process's accelerator."""
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
            f"process {rank()} of {processes()} lost another one while it waited for {what}: the error of the process "
            f"that ended first says why ({shown(str(error))})"
        ) from error


def _look_around(what: str, waited: float) -> None:
    """Publish what this rank waits for. Raise `StepError` on a timeout, or if another rank waits for anything else."""
    store, own = torch_private.default_store(), rank()
    store.set(f"{_WAITS}{own}", json.dumps(what))
    _written.add(own)
    for other in range(processes()):
        key = f"{_WAITS}{other}"
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


def _forget_wait() -> None:
    """Withdraw what `_look_around` published. After an error it stays until the next wait, for the others to see."""
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
