"""Checks that a private name of another library is still what our code takes it for."""

from collections.abc import Callable

import pytest


def confirm(check: Callable[[], bool], otherwise: str) -> None:
    """Fail with ``otherwise``, which says what broke and where to mend it, if the check is false or raises."""
    try:
        right = check()
    except Exception as error:
        pytest.fail(f"{otherwise} ({type(error).__name__}: {error})")
    assert right, otherwise
