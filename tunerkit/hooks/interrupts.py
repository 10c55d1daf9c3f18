"""Tell a user's Ctrl-C and other signals from exceptions that a plugin raises."""

import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import isfunction
from types import FrameType


@contextmanager
def watch_for_interrupts() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether the user pressed Ctrl-C inside the block.

    Python raises a user's KeyboardInterrupt in the main thread, from the handler of SIGINT. So one without that signal,
    or in another thread, comes from the code that runs.
    """
    before, pressed = signal.getsignal(signal.SIGINT), False
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield lambda: False
        return

    def note(number: int, frame: FrameType | None) -> object:
        nonlocal pressed
        pressed = True
        return before(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        # A plugin may have installed a handler of its own at import; that one stays.
        if signal.getsignal(signal.SIGINT) is note:
            signal.signal(signal.SIGINT, before)


def is_from_signal(error: BaseException) -> bool:
    """Whether a handler of a signal raised ``error``, which came while a plugin's code happened to run."""
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    codes = {handler.__code__ for handler in handlers if isfunction(handler)}
    return any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__))
