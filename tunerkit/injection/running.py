"""Rejects changes to a model while another thread runs it, as far as the model's own forward shows it."""

import functools
import threading
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from tunerkit.errors import AdapterError
from tunerkit.libraries import torch_private


class _Threads(WeakSet[threading.Thread]):
    """The threads that are inside the model's forward. A copy or a pickle of the model starts with none.

    By object, not by number: the system gives the number of a thread that has ended to the next one.
    """

    def __reduce__(self) -> tuple[type["_Threads"], tuple[()]]:
        return type(self), ()


_ATTRIBUTE = "_tunerkit_threads"


def watch_threads_(model: nn.Module) -> None:
    """Note which threads run ``model``, from now on."""
    threads = vars(model)[_ATTRIBUTE] = _Threads()
    model.register_forward_pre_hook(functools.partial(enter, threads), prepend=True)
    # Also called after an exception, or that thread would count as running.
    model.register_forward_hook(functools.partial(leave, threads), always_call=True)


def unwatch_threads_(model: nn.Module) -> None:
    """Undo `watch_threads_`."""
    torch_private.remove_hooks_(model, enter, leave)
    vars(model).pop(_ATTRIBUTE, None)


# Not under compile: compiled code must not have a Python side effect in each call.
def enter(threads: WeakSet[threading.Thread], model: nn.Module, args: Any) -> None:
    """Note that this thread runs ``model``: with ``threads`` bound, its forward pre-hook."""
    if not torch.compiler.is_compiling():
        threads.add(threading.current_thread())


def leave(threads: WeakSet[threading.Thread], model: nn.Module, args: Any, output: Any) -> None:
    """Undo `enter`: the forward hook."""
    if not torch.compiler.is_compiling():
        threads.discard(threading.current_thread())


def refuse_running(model: nn.Module, what: str) -> None:
    """Raise `AdapterError` if another thread is inside the forward of ``model``.

    Its output would be computed in part before and in part after the change. What is not seen: a forward that starts
    after this check, one of a part of the model alone, and compiled code. Those need a lock of the caller's.

    A thread that lives on after an interrupt (KeyboardInterrupt, SystemExit) in its forward counts until its next one.
    Torch calls hooks after an `Exception` only, and code outside of the call sees its end only by walking frames. A
    ``finally`` around the call needs another class for the model or a ``forward`` on the instance. The first would
    change its type; the second would hide the ones that accelerate and TRL set there, and be hidden by them.
    """
    threads: WeakSet[threading.Thread] = vars(model).get(_ATTRIBUTE, _Threads())
    running = [thread for thread in threading.enumerate() if thread in threads]
    if running and running != [threading.current_thread()]:
        raise AdapterError(
            f"another thread runs this {type(model).__name__}, and its output would be wrong if {what} changed the "
            "model now; wait until it is done, and let your server hold one lock for both. If it was interrupted in "
            "the model's forward (KeyboardInterrupt), run the model there once more"
        )
