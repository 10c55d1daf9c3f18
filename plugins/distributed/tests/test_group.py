"""The settings with which processes wait for one another."""

import pytest

from tunerkit.errors import ConfigError
from tunerkit_distributed import group


@pytest.mark.parametrize("given", ["soon", "0", "-1", "nan"])
def test_a_time_limit_that_is_none_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the variable and what it holds; an empty one means the default."""
    monkeypatch.setenv("TUNERKIT_LOOK_SECONDS", given)
    with pytest.raises(ConfigError, match=f"seconds above 0, got '{given}' @ TUNERKIT_LOOK_SECONDS"):
        group.wait_until(lambda: True, "nothing")
    monkeypatch.setenv("TUNERKIT_LOOK_SECONDS", "")
    assert group.wait_until(lambda: True, "nothing")
