"""Our own warnings, collected to be printed with a result."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tunerkit import TunerkitWarning


@contextmanager
def collected() -> Iterator[list[str]]:
    """Yield a list that gets each of our own warnings inside the block, once and as one line.

    Those of the libraries are left out.
    """
    found: list[str] = []

    def note(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        lines = str(message).replace(":\n- ", ": ").splitlines()
        text = "; ".join(line.removeprefix("- ").strip() for line in lines)
        if issubclass(category, TunerkitWarning) and text not in found:
            found.append(text)

    with warnings.catch_warnings():  # restores showwarning too
        warnings.simplefilter("always")
        warnings.showwarning = note
        yield found
