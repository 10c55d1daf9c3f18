"""Tell a user's Ctrl-C from a KeyboardInterrupt that a plugin raises."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
