"""The kit names the cause of each mistake first, in a sentence that says what to change, and passes what is right."""

from collections.abc import Iterator

import pytest

from tests import bad_plugins
from tests.bad_plugins import MISTAKES, Mistake
from tunerkit.testing import check_method
from tunerkit.testing.registering import registered
from tunerkit.testing.toy_methods import LowRankPlugin, ShiftPlugin


@pytest.fixture(scope="module")
def toys() -> Iterator[None]:
    with registered(LowRankPlugin(), ShiftPlugin()):
        yield


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.what)
def test_each_mistake_is_named_by_its_check_first(mistake: Mistake) -> None:
    """Law: the first check that fails is the one about the mistake; it is a failure with a sentence, not an error."""
    found = bad_plugins.first_failure(bad_plugins.results(mistake.plugin))
    assert (found.check, found.status) == (mistake.check, "failed"), found.reason
    assert len(found.reason.split()) > 8


@pytest.mark.parametrize("plugin", [bad_plugins.Plugin, bad_plugins.StateSaved])
def test_the_same_plugins_without_a_mistake_pass(plugin: type) -> None:
    """Law: nothing but the mistake is reported."""
    assert [r for r in bad_plugins.results(plugin) if r.status not in ("passed", "skipped")] == []


@pytest.mark.parametrize("method", ["toy-low-rank", "toy-shift", "toy-stepper"])
def test_methods_that_keep_the_contract_pass(toys: None, method: str) -> None:
    """Law: no check fails for a right method, and those that are skipped say why."""
    found = check_method(method)
    assert {result.case for result in found} in ({"bert", "llama"}, {"network"})
    assert [result for result in found if result.status not in ("passed", "skipped")] == []
    assert all(result.reason for result in found if result.status == "skipped")
