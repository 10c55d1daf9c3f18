"""Lines for the user, and our warnings as such lines."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from tunerkit import TunerkitWarning


@contextmanager
def telling_warnings(console: Console) -> Iterator[None]:
    """Print our own warnings inside the block as lines, and leave out those of the libraries."""
    shown: set[str] = set()

    def tell(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, TunerkitWarning) and str(message) not in shown:
            shown.add(str(message))
            say(console, f"note: {message}")

    with warnings.catch_warnings():  # restores showwarning too
        warnings.simplefilter("always")
        warnings.showwarning = tell
        yield


def say(console: Console, text: str) -> None:
    """Print a line as it is, without wrapping it at 80 columns and without reading names as markup."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)
