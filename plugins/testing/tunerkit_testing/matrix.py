"""All conformance cases as pytest parameters. If a library is missing, its cases are skipped with a reason."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from tunerkit_testing.known_cases import LIBRARIES, of_library


def cases() -> list[Any]:
    """Return one parameter per case, with the case's name as its id.

    ::

        @pytest.mark.parametrize("case", matrix.cases())
        def test_conforms(case): ...

    Returns:
        ``pytest.param`` objects. Each missing library has one, which is skipped with a reason.
    """
    return [parameter for library in LIBRARIES for parameter in _cases_of(library)]


def _cases_of(library: str) -> Iterator[Any]:
    if find_spec(library) is None:
        reason = f"the cases are {library} models, and {library} is not installed"
        yield pytest.param(None, id=library, marks=pytest.mark.skip(reason=reason))
        return
    for case in of_library(library):
        yield pytest.param(case, id=case.name)
