"""The fixture `toys`: toy methods and a small model with every kind of layer; and what methods declare for PEFT."""

import pytest

from tests.support.toys import saved as saved, toys as toys
from tunerkit_peft import declarations


@pytest.fixture
def no_other_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """No method declares PEFT's names, whatever is installed."""
    monkeypatch.setattr(declarations, "declarations", list)
