"""Runs the checks of a method, root causes first, and records what each one found."""

import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal
from unittest import SkipTest

import attrs
import torch

import tunerkit
from tunerkit import TunerkitError, hooks
from tunerkit.errors import PluginError, bounded, closest
from tunerkit.plugin import AdapterConfig
from tunerkit_testing.cases import Case, Check, name_of
from tunerkit_testing.checks.order import BY_NAME, CHECKS, NEEDS
from tunerkit_testing.known_cases import default_cases

Status = Literal["passed", "failed", "error", "skipped", "expected failure"]
_BAD: tuple[Status, ...] = ("failed", "error")
_NONE = object()  # equal to no value of a setting


@attrs.frozen
class CheckResult:
    """What one check found on one case.

    Attributes:
        check: The check's name.
        case: The case's name.
        status: ``"passed"``; ``"failed"``, the method violates the check's law; ``"error"``, it raised something else;
            ``"skipped"``, there was nothing to check, or a check that this one needs did not pass; or ``"expected
            failure"``.
        reason: Why, and what to change. A check that passed may say what it measured.
    """

    check: str
    case: str
    status: Status
    reason: str = ""


def check_method(
    name: str,
    config: AdapterConfig | Mapping[str, object] | None = None,
    cases: Iterable[Case] | None = None,
    expected_failures: Mapping[str, str] | None = None,
    *,
    checks: Iterable[str] | None = None,
) -> list[CheckResult]:
    """Run the checks of a method on small models.

    Checks whose failure explains others come first; those that depend on one that failed are skipped.

    Args:
        name: The method's name, in any case.
        config: Its config: an instance of its config class, a mapping of settings, or None for the defaults.
        cases: The models; by default a small BERT and a small Llama, or a small network without transformers.
        expected_failures: Reasons why checks fail, by the check's name. They still run; one that passes says so.
        checks: The names of the checks to run; by default all.

    Returns:
        One result for each check and case, case by case.

    Raises:
        ConfigError: The config is invalid.
        UnknownMethodError: No installed plugin provides the method.
        TunerkitError: There is no check of a name.
    """
    settings, expected = settings_of(name, config), expected_failures or {}
    wanted = [*CHECKS] if checks is None else find(checks)
    find(expected)
    return [
        result
        for case in (default_cases() if cases is None else cases)
        for result in _check_case(case, name, settings, wanted, expected)
    ]


def settings_of(name: str, config: AdapterConfig | Mapping[str, object] | None) -> dict[str, object]:
    """Return a config as a mapping of the settings that are given; it is checked.

    Args:
        name: The method's name.
        config: As in `check_method`.
    """
    if isinstance(config, AdapterConfig):  # a case's settings take the place of defaults
        shared = {field.name: field.default for field in attrs.fields(AdapterConfig)}
        plain = tunerkit.unstructure(config)
        mapping = {name: value for name, value in plain.items() if getattr(config, name) != shared.get(name, _NONE)}
    else:
        mapping = dict(config or {})
    tunerkit.structure(name, mapping)
    return mapping


def find(names: Iterable[str]) -> list[Check]:
    """Return checks by their names, in their order. Raises `TunerkitError` with the closest name of an unknown one."""
    given = list(names)
    for name in given:
        if name not in BY_NAME:
            hint = closest(name, BY_NAME) or f"; there are: {', '.join(BY_NAME)}"
            raise TunerkitError(f"no check named {name!r}{hint}")
    return [check for name, check in BY_NAME.items() if name in given]


def _check_case(
    case: Case,
    method: str,
    config: Mapping[str, object],
    checks: Sequence[Check],
    expected: Mapping[str, str],
) -> list[CheckResult]:
    results: dict[Check, CheckResult] = {}
    blocked: dict[Check, str] = {}  # the check that failed first, by those that depend on it
    for check in checks:
        cause = next((blocked[need] for need in NEEDS[check] if need in blocked), None)
        if cause is None:
            result = run_check(check, case, method, config)
            if result.status in _BAD:
                blocked[check] = result.check
                if result.check in expected:
                    result = attrs.evolve(result, status="expected failure", reason=expected[result.check])
            elif result.status == "passed" and result.check in expected:
                result = attrs.evolve(result, reason=unexpected_pass(expected[result.check]))
        else:
            blocked[check] = cause
            result = CheckResult(name_of(check), case.name, "skipped", f"because {cause} failed")
        results[check] = result
    return list(results.values())


def unexpected_pass(reason: str) -> str:
    """Return what to say of a check that passes although it is expected to fail, for this reason."""
    return f"it passes, and is expected to fail ({reason}); remove it from expected_failures"


def run_check(check: Check, case: Case, method: str, config: Mapping[str, object]) -> CheckResult:
    """Run one check in a folder of its own, with a random state of its own and without warnings.

    Args:
        check: The check.
        case: The model.
        method: The method's name.
        config: Its settings.
    """
    status: Status = "passed"
    with (
        tempfile.TemporaryDirectory() as folder,
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(action="ignore"),
    ):
        try:
            reason = check(case, hooks.registry.named(method), config, Path(folder)) or ""
        except SkipTest as error:
            status, reason = "skipped", str(error)
        except (AssertionError, PluginError) as error:
            status, reason = "failed", str(error) or f"an assertion of {name_of(check)} failed: {check.__doc__}"
        except Exception as error:
            status, reason = "error", _explained(check, error)
    return CheckResult(name_of(check), case.name, status, bounded(reason))


def _explained(check: Check, error: Exception) -> str:
    notes = getattr(error, "__notes__", [])
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = "" if place is None else f" in {Path(place.tb_frame.f_code.co_filename).name}, line {place.tb_lineno}"
    told = "; ".join([f"{type(error).__name__}: {error}", *notes])
    return f"{told}{where}. The check's law: {' '.join((check.__doc__ or '').split())}"
