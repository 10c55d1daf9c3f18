"""A method may be given as its plugin, which is registered for the time of its checks alone."""

import pytest
from torch import Tensor, nn

import tunerkit
from plugins.testing.tests import bad_methods
from plugins.testing.tests.bad_methods import CASE
from tunerkit.plugin import parameter, setting
from tunerkit_testing import check_method, parametrize_with_checks
from tunerkit_testing.registering import registered
from tunerkit_testing.runner import method_of
from tunerkit_testing.toy_methods import ShiftPlugin


@tunerkit.method("toy-function")
def function(
    b: Tensor = parameter("out", "rank"),
    a: Tensor = parameter("rank", "in", start=nn.init.normal_),
    rank: int = setting(2, ge=1, doc="Rows of a."),
) -> Tensor:
    """ΔW = B A."""
    return b @ a


@pytest.mark.parametrize("plugin", [function, bad_methods.Plugin()], ids=["function", "hooks"])
def test_a_plugin_is_checked_without_being_registered(plugin: object) -> None:
    """Law: all checks run, and afterwards the method is as unknown as before; a wrong config is refused."""
    found = check_method(plugin, {"rank": 3}, [CASE])
    assert [result for result in found if result.status not in ("passed", "skipped")] == []
    with pytest.raises(tunerkit.errors.ConfigError, match="unknown key 'rnk'"):
        check_method(plugin, {"rnk": 3}, [CASE])
    with method_of(plugin) as name:
        assert name in tunerkit.methods()
    assert name not in tunerkit.methods()


def test_a_plugin_that_is_registered_already_stays_so() -> None:
    """Law: whoever registered it goes on with it."""
    with registered(function):
        check_method(function, cases=[CASE], checks=["start"])
        assert "toy-function" in tunerkit.methods()


@parametrize_with_checks(function, cases=[CASE], checks=["start", "merges", "pickle"])
def test_a_test_takes_a_plugin(check: object) -> None:
    """Law: the method is there while each test runs."""
    assert callable(check)
    check()
    assert "toy-function" not in tunerkit.methods()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (ShiftPlugin(), "got ShiftPlugin with the methods toy-shift, toy-stepper: pass one of these"),
        (3, "such as what @tunerkit.method returns; got int$"),
    ],
)
def test_what_is_no_plugin_of_one_method_is_refused(given: object, message: str) -> None:
    """Law: one line says what was got and what to pass."""
    with pytest.raises(tunerkit.TunerkitError, match=message):
        check_method(given, cases=[CASE])
