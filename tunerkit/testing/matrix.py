"""Every case of the kit as pytest parameters; those of a library that is not installed skip and say so."""

from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest

LIBRARIES = ("transformers", "diffusers", "timm")


def cases() -> list[Any]:
    """One parameter for each case, named after it, and one that skips for each library that is missing.

    ::

        @pytest.mark.parametrize("case", matrix.cases())
        def test_conforms(case): ...
    """
    return [parameter for library in LIBRARIES for parameter in _cases_of(library)]


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
    for case in import_module(f"tunerkit.testing.{library}_cases").CASES:
        yield pytest.param(case, id=case.name)
