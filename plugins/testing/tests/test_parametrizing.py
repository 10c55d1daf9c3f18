"""A test with all checks of a method: one for each check and case, which fails, skips or xfails as the kit says."""

from typing import Any

import attrs
import pytest
from torch import Tensor, nn

import tunerkit
from plugins.testing.tests import bad_methods
from plugins.testing.tests.bad_methods import CASE, LoopsInAStep, NoRoomIn, plugin_of
from tunerkit import TunerkitError
from tunerkit_testing import matrix, parametrize_with_checks
from tunerkit_testing.cases import STEPS, Case, Trial
from tunerkit_testing.checks.order import CHECKS
from tunerkit_testing.known_cases import NETWORK
from tunerkit_testing.registering import registered
from tunerkit_testing.runner import BoundCheck, Shared, run_check


def parameters_of(**options: Any) -> dict[str, Any]:
    """The parameters of a test by id."""

    @parametrize_with_checks("bad", {"rank": 2}, **options)
    def test(check: BoundCheck) -> None:
        check()

    (mark,) = vars(test)["pytestmark"]
    return {parameter.id: parameter for parameter in mark.args[1]}


def bound(check: str, **options: Any) -> BoundCheck:
    """One check on the small model."""
    found: BoundCheck = parameters_of(cases=[CASE], **options)[f"square-{check}"].values[0]
    return found


def test_there_is_a_test_for_each_check_and_case() -> None:
    """Law: the ids name case and check, and the method need not be installed when tests are collected."""
    ids = list(parameters_of(cases=[CASE]))
    assert len(ids) == len(CHECKS)
    assert ids[0] == "square-config_round_trip"
    assert list(parameters_of(cases=[CASE], checks=["start"])) == ["square-start"]


def test_pytest_parameters_are_accepted_as_cases() -> None:
    """Law: a case whose library is missing is skipped with its reason, as in the matrix."""
    skipped = pytest.param(None, id="gone", marks=pytest.mark.skip(reason="not installed"))
    found = parameters_of(cases=[skipped, *matrix.cases()[:1]], checks=["start"])
    assert found["gone-start"].marks[0].kwargs["reason"] == "not installed"
    assert len(found) == 2


def test_names_are_accepted_as_cases() -> None:
    """Law: a name means the kit's own case, beside cases; an unknown one is refused when tests are collected."""
    assert list(parameters_of(cases=["network", CASE], checks=["start"])) == ["network-start", "square-start"]
    with pytest.raises(TunerkitError, match="no case named 'nettwork'; did you mean 'network'"):
        parameters_of(cases=["nettwork"])


def test_a_check_passes_or_fails_with_its_sentence() -> None:
    """Law: the message is the sentence alone, without a traceback of the kit."""
    with registered(bad_methods.Plugin()):
        bound("start")()
    with (
        registered(plugin_of(bad_methods.StartsFarOff)()),
        pytest.raises(pytest.fail.Exception, match=r"start on square: .*0\.00911"),
    ):
        bound("start")()


def test_a_check_that_fails_for_another_reason_is_skipped_with_it() -> None:
    """Law: each test stands alone, and still the root cause is the only failure."""
    with registered(plugin_of(bad_methods.AllZero)()):
        with pytest.raises(pytest.skip.Exception, match="because every_tensor_moves failed"):
            bound("loss_falls")()
        with pytest.raises(pytest.fail.Exception, match="every_tensor_moves on square"):
            bound("every_tensor_moves")()


def test_a_check_without_a_subject_is_skipped_with_its_reason() -> None:
    """Law: a skipped check says what the method does not have."""
    with registered(bad_methods.Plugin()), pytest.raises(pytest.skip.Exception, match="share no module"):
        bound("shared_module_used")()


def test_an_expected_failure_is_an_xfail_with_its_reason() -> None:
    """Law: it is xfailed only if the check fails; one that passes is a failure that says what to remove."""
    expected = {"delta_is_what_forward_adds": "no delta yet", "start": "never fails"}
    with registered(bad_methods.DeltaMissing()):
        with pytest.raises(pytest.xfail.Exception, match="no delta yet"):
            bound("delta_is_what_forward_adds", expected_failures=expected)()
        with pytest.raises(pytest.fail.Exception, match=r"start on square: it passes.*\(never fails\); remove it from"):
            bound("start", expected_failures=expected)()
        with pytest.raises(pytest.xfail.Exception, match="not merged yet"):
            bound("merges", expected_failures={"merges": "not merged yet"})()
        with pytest.raises(pytest.skip.Exception, match="because delta_is_what_forward_adds failed"):
            bound("merges")()
        with pytest.raises(pytest.fail.Exception, match="which this needs, is expected to fail"):
            bound("delta_gives_gradients", expected_failures=expected)()


def test_a_model_that_the_method_refuses_is_skipped_beside_one_that_it_takes() -> None:
    """Law: as for `check_method`; alone, its test fails."""
    with registered(NoRoomIn()):
        found = parameters_of(cases=[CASE, NETWORK], checks=["building_keeps_the_base"])
        with pytest.raises(pytest.skip.Exception, match=r"cannot be used on this model: .*6 features are too few"):
            found["square-building_keeps_the_base"].values[0]()
        with pytest.raises(pytest.fail.Exception, match="6 features are too few"):
            bound("building_keeps_the_base")()


@pytest.mark.skipif("lora" not in tunerkit.methods(), reason="the check compares with LoRA, which is not installed")
def test_advice_is_a_warning() -> None:
    """Law: the test passes, and pytest shows the sentence at its end."""
    with registered(LoopsInAStep()), pytest.warns(tunerkit.TunerkitWarning, match="operations on square: .* LoRA's"):
        bound("operations")()


def test_the_checks_of_a_case_share_a_training() -> None:
    """Law: the second check that needs a trained model takes no step, and finds the model as it was trained."""
    steps: list[int] = []

    def loss(model: nn.Module) -> Tensor:
        steps.append(len(steps))
        return CASE.loss(model)

    with registered(bad_methods.Plugin()):
        found = parameters_of(cases=[attrs.evolve(CASE, loss=loss)], checks=["only_the_adapter_trains", "merges"])
        for parameter in found.values():
            parameter.values[0]()
    assert len(steps) == STEPS


def test_what_checks_share_ends_with_a_failure_and_with_another_case_or_plugin() -> None:
    """Law: a model that a failed check may have changed is built again, and nothing of another plugin is used."""

    def trial(case: Case) -> Trial:
        return BoundCheck(fails, case, "bad", None, [case], {}, shared).trial("bad")

    def computed(case: Case) -> object:
        return trial(case).once(anything)

    shared, found = Shared(), list[object]()
    for _ in range(2):
        with registered(bad_methods.Plugin()):
            found.append(computed(CASE))
            assert computed(CASE) is found[-1]
            assert run_check(fails, trial(CASE)).status == "failed"
            found += [computed(CASE), computed(NETWORK), computed(CASE)]
    assert len(set(map(id, found))) == 8


def anything(trial: Trial) -> object:
    """What is kept: another object at each call."""
    return object()


def fails(trial: Trial) -> None:
    """A check that fails."""
    raise AssertionError


def test_a_mistyped_check_is_refused_when_tests_are_collected() -> None:
    """Law: in ``checks`` and in ``expected_failures``, with the closest name."""
    for options in ({"checks": ["stat"]}, {"expected_failures": {"stat": "not yet"}}):
        with pytest.raises(TunerkitError, match="no check named 'stat'; did you mean 'start'"):
            parameters_of(cases=[CASE], **options)
