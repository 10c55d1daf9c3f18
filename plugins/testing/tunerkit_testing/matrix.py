"""All conformance cases as pytest parameters. If a library is missing, its cases are skipped with a reason."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from tunerkit_testing.known_cases import LIBRARIES, of_library

LONG = "TUNERKIT_LONG"


def cases() -> list[Any]:
    """Return one parameter per case, with the case's name as its id.

    ::

        @pytest.mark.parametrize("case", matrix.cases())
        def test_conforms(case): ...

    Returns:
        ``pytest.param`` objects. Each missing library has one, which is skipped with a reason.
    """
    return [parameter for library in LIBRARIES for parameter in _cases_of(library)]


def is_long() -> bool:
    """Whether the environment asks for the long form of tests that have one."""
    return os.environ.get(LONG) == "1"


def by_length() -> list[Any]:
    """Of `cases` a small BERT and a small Llama; all of them if the environment has ``TUNERKIT_LONG=1``.

    For tests that run many checks on each case.
    """
    return cases() if is_long() else [case for case in cases() if case.id in ("bert", "llama")]


def few() -> list[Any]:
    """Of `cases` one for each kind of base layer, for tests that have many configs."""
    return [case for case in cases() if case.id in ("bert", "gpt2", "gemma3", "resnet")]


def linear() -> list[Any]:
    """Those of `cases` that have linear layers beside a head."""
    return [case for case in cases() if case.id != "resnet"]


def _cases_of(library: str) -> Iterator[Any]:
    if find_spec(library) is None:
        reason = f"the cases are {library} models, and {library} is not installed"
        yield pytest.param(None, id=library, marks=pytest.mark.skip(reason=reason))
        return
    for case in of_library(library):
        yield pytest.param(case, id=case.name)
