"""Checks of a method's config: JSON and back, and the errors for bad input."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from torch import nn

import tunerkit
from tunerkit_testing.checks.configs import assert_survives_json

check_survives_json = assert_survives_json


def mistakes(method: str, mapping: Mapping[str, Any]) -> list[str]:
    """The lines of the error that ``mapping`` is rejected with, one for each mistake."""
    with pytest.raises(tunerkit.errors.ConfigError) as caught:
        tunerkit.structure(method, mapping)
    return [line.removeprefix("- ") for line in str(caught.value).splitlines() if "@ $" in line]


def check_one_mistake(method: str, mapping: Mapping[str, Any], words: Sequence[str]) -> None:
    """``mapping`` is rejected for one mistake, in a line that has all of ``words``."""
    (line,) = mistakes(method, mapping)
    assert all(word in line for word in words), line


def check_unmatched_pattern(method: str, field: str, value: object) -> None:
    """A pattern that matches no target is an error with the closest name, and the model stays as it was.

    Args:
        method: the method's name.
        field: a setting that maps patterns to values.
        value: one that the setting allows.
    """
    model = nn.ModuleDict({"query": nn.Linear(4, 4), "value": nn.Linear(4, 4)})
    before = list(model.state_dict())
    with pytest.raises(tunerkit.errors.ConfigError, match=rf"'qury' matches none.*query.*@ \$\.{re.escape(field)}"):
        tunerkit.wrap(model, method, {"targets": ["query", "value"], field: {"qury": value}})
    assert list(model.state_dict()) == before
