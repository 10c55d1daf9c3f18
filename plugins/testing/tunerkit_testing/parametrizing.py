"""Parametrises a test over the checks of the kit; pytest is imported only when it is called."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import attrs

from tunerkit.errors import warn
from tunerkit.plugin import AdapterConfig
from tunerkit_testing.cases import Case, Check, name_of
from tunerkit_testing.checks.order import CHECKS, NEEDS
from tunerkit_testing.kit import (
    CheckResult,
    as_expected,
    beside_expected,
    declared_failures,
    find,
    run_check,
    settings_of,
    unsuited,
)
from tunerkit_testing.known_cases import default_cases, named
from tunerkit_testing.registering import method_of
from tunerkit_testing.remembering import Shared

Test = TypeVar("Test", bound=Callable[..., None])


@attrs.frozen(eq=False)
class BoundCheck:
    """One check on one case, to be called in a test: it passes, fails, skips, or fails as expected.

    Attributes:
        check: The check.
        case: The model.
        method: The method's name, or its plugin.
        config: The method's config.
        given: All cases of the test.
        expected: Reasons why checks fail, by name. If this one passes all the same, its test fails. It does not if the
            reason stands in the method's record.
        shared: What it has in common with the other checks of its test.
    """

    check: Check
    case: Case
    method: object
    config: AdapterConfig | Mapping[str, object] | None
    given: Sequence[Case]
    expected: Mapping[str, str]
    shared: Shared = attrs.field(factory=Shared, repr=False)

    def __call__(self) -> None:
        """Run the check. If it fails, those that it needs are run too, since their failure would explain it.

        A check that passes and is expected to fail makes the test fail, as a strict xfail does. Advice is a warning.
        """
        import pytest  # the command `tunerkit check` works without it

        expected = self._expected()
        result = as_expected(self._run(self.check), expected)
        where = f"{result.check} on {result.case}"
        if result.status == "skipped":
            pytest.skip(result.reason)
        if result.status == "expected failure":
            pytest.xfail(result.reason)
        if result.status == "advice":
            warn(f"{where}: {result.reason}")
        elif result.status == "passed":
            if result.check in self.expected:
                pytest.fail(f"{where}: {result.reason}", pytrace=False)
        elif (reason := self._unsuited()) is not None:
            pytest.skip(reason)
        elif (cause := self._cause(self.check, expected)) is not None:
            pytest.skip(f"because {cause} failed")
        else:
            pytest.fail(f"{where}: {beside_expected(self.check, expected)}{result.reason}", pytrace=False)

    def _run(self, check: Check) -> CheckResult:
        with method_of(self.method) as name, self.shared.on(self.case):
            return run_check(check, self.case, name, settings_of(name, self.config))

    def _unsuited(self) -> str | None:
        with method_of(self.method) as name:
            return unsuited(self.case, self.given, name, settings_of(name, self.config))

    def _expected(self) -> Mapping[str, str]:
        with method_of(self.method) as name:
            return {**declared_failures(name), **self.expected}

    def _cause(self, check: Check, expected: Mapping[str, str]) -> str | None:
        """Return the name of the first check that fails, and is not expected to, of all that a check needs."""
        for need in NEEDS[check]:
            if (cause := self._cause(need, expected)) is not None:
                return cause
            if name_of(need) not in expected and self._run(need).status in ("failed", "error"):
                return name_of(need)
        return None


def parametrize_with_checks(
    method: object,
    config: AdapterConfig | Mapping[str, object] | None = None,
    cases: Iterable[Any] | None = None,
    expected_failures: Mapping[str, str] | None = None,
    *,
    checks: Iterable[str] | None = None,
) -> Callable[[Test], Test]:
    """Run a test with each check of a method on each case; its argument ``check`` is called without arguments.

    ::

        @parametrize_with_checks("my-method", {"rank": 2})
        def test_keeps_the_contract(check):
            check()

    The method is looked up when a test runs, so a fixture may register it.

    Args:
        method: The method's name; or its plugin, such as what `tunerkit.method` returns, which is then registered while
            a test runs.
        config: Its config: an instance of its config class, a mapping of settings, or None for the defaults.
        cases: Cases, their names, or pytest parameters such as those of `tunerkit_testing.matrix.cases`; by default
            those of `check_method`.
        expected_failures: Reasons why checks fail, by the check's name. Their tests are xfailed, strictly: one whose
            check passes fails. Others that fail for the same reason are named too. If a check fails on some models
            alone, parametrise a second test with these. Those of the method's own record are added, and may pass.
        checks: The names of the checks to run; by default all.

    Raises:
        TunerkitError: There is no check or case of a name.
    """
    import pytest  # as above

    wanted, expected = [*CHECKS] if checks is None else find(checks), expected_failures or {}
    find(expected)
    given = [
        (each, each.name, ()) if isinstance(each, Case) else (each.values[0], each.id, each.marks)
        for one in (default_cases() if cases is None else cases)
        for each in (named([one]) if isinstance(one, str) else [one])
    ]
    models = [case for case, _, _ in given if case is not None]
    found, shared = [], Shared()
    for case, label, marks in given:
        found += [
            pytest.param(
                BoundCheck(check, case, method, config, models, expected, shared), id=f"{label}-{each}", marks=marks
            )
            for check in wanted
            for each in (name_of(check),)
        ]
    return lambda test: pytest.mark.parametrize("check", found)(test)
