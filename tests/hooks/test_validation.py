"""What a plugin declares of itself: the number of the contract it was written for, and the records of its methods."""

from typing import Any

import pytest
import torch
from torch import nn

import tunerkit
from tunerkit.hooks import loading
from tunerkit.plugin import Method, Statistics, StatisticsRequest, fit_start_
from tunerkit_testing.registering import registered
from tunerkit_testing.toy_methods import LowRankConfig, LowRankPlugin

NEWER = loading.API + 1


class Numbered(LowRankPlugin):
    """Has a number of the contract, which each test sets."""


def numbered(number: Any) -> Numbered:
    plugin = Numbered()
    setattr(plugin, loading.API_NAME, number)
    return plugin


@pytest.mark.parametrize("number", range(loading.OLDEST_API, loading.API + 1))
def test_a_plugin_of_a_supported_contract_is_accepted(number: int) -> None:
    """From the oldest one that still works to the newest."""
    with registered(numbered(number)):
        assert tunerkit.methods()["toy-low-rank"].error is None


def test_a_plugin_without_a_number_is_of_the_first_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    """So were those from before there was one; once the first is no longer supported, they are refused."""
    with registered(LowRankPlugin()):
        assert "toy-low-rank" in tunerkit.methods()
    monkeypatch.setattr(loading, "API", 4)
    monkeypatch.setattr(loading, "OLDEST_API", 2)
    with pytest.raises(tunerkit.errors.PluginError, match=r"for TUNERKIT_API 1, .*supports 2 to 4; install a newer"):
        tunerkit.register(LowRankPlugin())


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (NEWER, rf"written for TUNERKIT_API {NEWER}, .*to {loading.API}; install a newer tunerkit"),
        (10**30, "install a newer tunerkit"),
        (0, r"TUNERKIT_API is 0; expected the version of the plugin API, as in TUNERKIT_API = \d"),
        (-1, "TUNERKIT_API is -1; expected"),
        ("1", "TUNERKIT_API is '1'; expected"),
        (1.0, r"TUNERKIT_API is 1\.0; expected"),
        (True, "TUNERKIT_API is True; expected"),
        (None, "TUNERKIT_API is None; expected"),
        ((1, 0), r"TUNERKIT_API is \(1, 0\); expected"),
        ("1" * 100_000, "TUNERKIT_API is '1"),
    ],
)
def test_another_number_is_refused_and_nothing_is_registered(number: Any, words: str) -> None:
    """A newer contract, one that is no number, or none that ever was; each error is short and says what to do."""
    with pytest.raises(tunerkit.errors.PluginError, match=words) as error:
        tunerkit.register(numbered(number))
    assert len(str(error.value)) < 1000
    assert "toy-low-rank" not in tunerkit.methods()


class Declaring(LowRankPlugin):
    """Yields one record with the given fields."""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields

    @tunerkit.hookimpl
    def tunerkit_methods(self) -> list[Method]:
        return [Method("toy-declaring", config=LowRankConfig, **self.fields)]


class Calibrating(Declaring):
    @tunerkit.hookimpl
    def tunerkit_calibrate(self) -> None:
        pass


def test_statistics_without_the_hook_that_takes_them_are_refused() -> None:
    """The method could never be calibrated."""
    words = r"method 'toy-declaring' requests statistics, but there is no hook tunerkit_calibrate"
    with pytest.raises(tunerkit.errors.PluginError, match=words):
        tunerkit.register(Declaring(statistics=StatisticsRequest(inputs=2)))
    with registered(Calibrating(statistics=StatisticsRequest(inputs=2))):
        model = tunerkit.wrap(nn.Sequential(nn.Linear(3, 3)), "toy-declaring", {"targets": ["0"]})
        fit_start_(tunerkit.tuner(model), lambda request, bases: ({"0": Statistics(2, torch.ones(2, 3), None)}, 1))
