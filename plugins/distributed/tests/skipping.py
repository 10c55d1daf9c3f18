"""A training in which one process skips a backward or has one more, whatever the engine: the error of each process."""

import faulthandler
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

import tunerkit
from tests.support import together

SECONDS = 60  # until a process that hangs ends, with a traceback


def skips_backward(
    rank: int,
    model: nn.Module,
    step: Callable[[], object],
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> str:
    """Train, with no backward in the second step of process 1; the error of this process.

    Args:
        rank: The number of this process.
        model: The model that runs, on the rows of `tests.support.together`.
        step: Takes a step, and clears the gradients.
        backward: Takes the loss backward.
    """
    return _error(lambda: _train(model, step, backward, lambda number: int((rank, number) != (1, 1))))


def has_one_more(
    rank: int,
    model: nn.Module,
    step: Callable[[], object],
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> str:
    """Train like `skips_backward`, with two batches in the second step of process 1, and one in all others."""
    return _error(lambda: _train(model, step, backward, lambda number: 1 + int((rank, number) == (1, 1))))


def _train(
    model: nn.Module,
    step: Callable[[], object],
    backward: Callable[[Tensor], object],
    backwards: Callable[[int], int],
) -> None:
    for number in range(4):
        x, classes = together.rows(number)
        for _ in range(backwards(number)):
            backward(nn.functional.cross_entropy(model(x), classes))
        if not backwards(number):
            model(x)  # it skips the backward alone: engines exchange something in a forward too
        step()


def _error(call: Callable[[], object]) -> str:
    with limited():
        try:
            call()
        except tunerkit.TunerkitError as error:
            return f"{type(error).__name__}: {error}"
    return ""


@contextmanager
def limited(seconds: float = SECONDS) -> Iterator[None]:
    """End the process with a traceback if the block takes longer."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
