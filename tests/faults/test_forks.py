"""The process that injects faults survives what fails in it, and says so."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.forks import failures


def nothing(count: int, folder: Path) -> Iterator[tuple[str, str]]:
    """An attack that finds nothing."""
    yield from (("a case", ""),) * count


def broken() -> None:
    """A preparation that fails."""
    raise ValueError("it cannot be prepared")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the faults are injected in forks")
def test_what_cannot_be_prepared_is_a_failure_with_its_traceback() -> None:
    """And the next attack runs."""
    for _ in range(2):
        with pytest.raises(AssertionError, match=r"in broken\n.*\nValueError: it cannot be prepared"):
            failures(nothing, 1, broken)
    assert failures(nothing, 2) == []
