"""Sizes that are given and do not fit a layer are refused in one line that says what does."""

import pytest
from torch import nn

import tunerkit
from tunerkit.errors import ConfigError, TargetError, TunerkitWarning


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        (
            "c3a",
            {"block_size": 5},
            "block_size is 5, which does not divide 16 (both sides of the layer); 1, 2, 4, 8 do",
        ),
        ("fourierft", {"count": 513}, "count is 513, and at most 512 fits here"),
        ("miss", {"rank": 33}, "rank is 33, and at most 32 fits here"),
        ("randlora", {"rank": 17}, "rank is 17, and at most 16 fits here"),
        ("vblora", {"length": 32}, "length is 32, which does not divide 16"),
        ("vblora", {"vectors": 2, "top": 4}, "top is 4, and at most 2 fits here"),
    ],
)
def test_a_size_that_does_not_fit_is_refused(method: str, settings: dict[str, object], said: str) -> None:
    """The model stays as it was."""
    model = nn.Sequential(nn.Linear(32, 16))
    with pytest.raises(TargetError) as error:
        tunerkit.wrap(model, method, {"targets": "re:0", **settings})
    assert said in str(error.value).splitlines()[0]
    assert not list(model[0].children())


@pytest.mark.parametrize(("settings", "path"), [({"top": 3}, "$.top"), ({"vectors": 7}, "$.vectors")])
def test_vblora_says_which_numbers_cannot_start_at_zero(settings: dict[str, object], path: str) -> None:
    """Vectors begin in pairs that cancel, so their numbers are even; the paper's start takes any."""
    model = nn.Sequential(nn.Linear(32, 16))
    with pytest.raises(ConfigError, match="even number") as error:
        tunerkit.wrap(model, "vblora", {"targets": "re:0", **settings})
    assert path in str(error.value)
    tunerkit.wrap(model, "vblora", {"targets": "re:0", "start": "random", **settings})


@pytest.mark.parametrize(("method", "name"), [("c3a", "block_size"), ("vblora", "length")])
def test_sides_without_a_common_divisor_are_said(method: str, name: str) -> None:
    """A block of one number gains nothing, and one odd layer would make many parameters of a few."""
    model = nn.Sequential(nn.Linear(32, 17))
    with pytest.warns(TunerkitWarning, match=f"{name} is 1, because nothing above 1 divides both sides"):
        tunerkit.wrap(model, method, {"targets": "re:0"})


def test_core_knows_these_names_where_the_distribution_is_not_installed() -> None:
    """So that the error about a method says how to install it."""
    from tunerkit import extras, hooks

    named = {name for name, line in extras.METHODS_ELSEWHERE.items() if line.startswith("tunerkit-methods")}
    assert named == {name for name, info in hooks.methods().items() if info.distribution == "tunerkit-methods"}
