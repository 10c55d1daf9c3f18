"""Lines for the user, and our warnings as such lines."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from rich.console import Console

from tunerkit import TunerkitWarning
from tunerkit.errors import cut


@contextmanager
def own_warnings(take: Callable[[str], None]) -> Iterator[None]:
    """Hand each of our own warnings inside the block over, once, and leave out those of the libraries."""
    shown: set[str] = set()

    def note(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, TunerkitWarning) and str(message) not in shown:
            shown.add(str(message))
            take(str(message))

    with warnings.catch_warnings():  # restores showwarning too
        warnings.simplefilter("always")
        warnings.showwarning = note
        yield


def telling_warnings(console: Console) -> AbstractContextManager[None]:
    """Print our own warnings inside the block as lines."""
    return own_warnings(lambda text: say(console, f"note: {text}"))


def say(console: Console, text: str) -> None:
    """Print a line as it is, without wrapping it at 80 columns and without reading names as markup."""
    console.print(text, soft_wrap=True, markup=False, emoji=False, highlight=False)


def one_line(text: str) -> str:
    """Return a message of several lines as one, of at most 2,500 characters; a list's items are divided by ``;``."""
    whole = text.replace(":\n- ", ": ").replace("\n- ", "\n")
    return cut("; ".join(line.strip() for line in whole.splitlines()), 2500)
