"""Runs the checks of a method, root causes first, and records what each one found."""

import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from unittest import SkipTest

import attrs
import torch

import tunerkit
from tunerkit import TunerkitError, hooks
from tunerkit.errors import PluginError, TargetError, bounded, closest, shown
from tunerkit.plugin import AdapterConfig
from tunerkit_testing.blaming import told
from tunerkit_testing.cases import Advice, Case, Check, name_of, wrapped
from tunerkit_testing.checks.order import BY_NAME, CHECKS, NEEDS
from tunerkit_testing.known_cases import default_cases, named
from tunerkit_testing.registering import method_of
from tunerkit_testing.remembering import forget, remembering

Status = Literal["passed", "advice", "failed", "error", "skipped", "expected failure"]
_BAD: tuple[Status, ...] = ("failed", "error")
_NONE = object()  # equal to no value of a setting


@attrs.frozen
class CheckResult:
    """What one check found on one case.

    Attributes:
        check: The check's name.
        case: The case's name.
        status: ``"passed"``; ``"advice"``, the method keeps the contract and could do better; ``"failed"``, it violates
            the check's law; ``"error"``, it raised something else; ``"skipped"``, there was nothing to check, or a
            check that this one needs did not pass; or ``"expected failure"``.
        reason: Why, and what to change. A check that passed may say what it measured.
    """

    check: str
    case: str
    status: Status
    reason: str = ""


def check_method(
    method: object,
    config: AdapterConfig | Mapping[str, object] | None = None,
    cases: Iterable[Case | str] | None = None,
    expected_failures: Mapping[str, str] | None = None,
    *,
    checks: Iterable[str] | None = None,
) -> list[CheckResult]:
    """Run the checks of a method on small models.

    Checks whose failure explains others come first; those that depend on one that failed are skipped.

    Args:
        method: The method's name, in any case; or its plugin, such as what `tunerkit.method` returns, which is then
            registered for the time of the checks.
        config: Its config: an instance of its config class, a mapping of settings, or None for the defaults.
        cases: The models, or names of the kit's own; by default a small BERT, GPT-2 and Llama, or a small network
            without transformers.
        expected_failures: Reasons why checks fail, by the check's name. They still run; one that passes says so. Those
            that depend on them run too: each one that fails as well needs a reason of its own. Those that the method's
            own record expects are added, see `declared_failures`.
        checks: The names of the checks to run; by default all.

    Returns:
        One result for each check and case, case by case.

    Raises:
        ConfigError: The config is invalid.
        UnknownMethodError: No installed plugin provides the method.
        TunerkitError: There is no check or case of a name, or the plugin has no method or several.
    """
    wanted, expected = [*CHECKS] if checks is None else find(checks), dict(expected_failures or {})
    find(expected)
    with method_of(method) as name:
        settings, given = settings_of(name, config), default_cases() if cases is None else named(cases)
        expected = {**declared_failures(name), **expected}
        return [result for case in given for result in _check_case(case, name, settings, wanted, expected, given)]


def declared_failures(name: str) -> Mapping[str, str]:
    """Return the reasons why checks of a method fail that stand in its record, by the check's name.

    ::

        Method("my-dora", config=Config, foreign={"testing": {"expected_failures": {"gradients_are_true": "why"}}})

    Where such a check passes, as on another model, it has passed.

    Args:
        name: The method's name.

    Raises:
        PluginError: It is no mapping from names of checks to reasons.
    """
    given = hooks.registry.get(hooks.registry.named(name)).foreign.get("testing", {})
    found: Any = given.get("expected_failures", {})
    where = f"foreign['testing'] of method {name!r}"
    if given.keys() - {"expected_failures"} or not isinstance(found, Mapping):
        raise PluginError(f"{where}: expected {{'expected_failures': {{CHECK: REASON}}}}, got {shown(str(given))}")
    for check, reason in found.items():
        if not isinstance(reason, str) or not reason.strip():
            raise PluginError(f"{where}: expected a reason why {check!r} fails, got {reason!r}")
    try:
        find(found)
    except TunerkitError as error:
        raise PluginError(f"{where}: {error}") from error
    return dict(found)


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
    given: Sequence[Case],
) -> list[CheckResult]:
    if (reason := unsuited(case, given, method, config)) is not None:
        return [CheckResult(name_of(check), case.name, "skipped", reason) for check in checks]
    results: list[CheckResult] = []
    blocked: dict[Check, str] = {}  # the check that failed first, by those that depend on it
    with remembering():
        for check in checks:
            cause = next((blocked[need] for need in NEEDS[check] if need in blocked), None)
            if cause is not None:
                blocked[check] = cause
                results.append(CheckResult(name_of(check), case.name, "skipped", f"because {cause} failed"))
                continue
            result = as_expected(run_check(check, case, method, config), expected)
            if result.status in _BAD:
                blocked[check] = result.check
                result = attrs.evolve(result, reason=beside_expected(check, expected) + result.reason)
            results.append(result)
    return results


def unsuited(case: Case, given: Iterable[Case], method: str, config: Mapping[str, object]) -> str | None:
    """Return why a method adapts nothing in a model, such as tied embeddings; None if it does, or adapts none at all.

    Args:
        case: The model.
        given: All models that the method is checked on.
        method: The method's name.
        config: Its settings.
    """
    reason = _refusal(case, method, config)
    if reason is None or all(_refusal(each, method, config) for each in given):
        return None
    return f"the method cannot be used on this model: {reason}"


def _refusal(case: Case, method: str, config: Mapping[str, object]) -> str | None:
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"), _as_usual():
            wrapped(case, method, config)
    except TargetError as error:
        return bounded(str(error))
    except Exception:  # checks are about it
        return None
    return None


def as_expected(result: CheckResult, expected: Mapping[str, str]) -> CheckResult:
    """Return a result in the light of the failures that are expected.

    Args:
        result: What a check found.
        expected: Reasons why checks fail, by name.
    """
    if result.check not in expected:
        return result
    if result.status in (*_BAD, "advice"):
        return attrs.evolve(result, status="expected failure", reason=expected[result.check])
    return attrs.evolve(result, reason=unexpected_pass(expected[result.check])) if result.status == "passed" else result


def beside_expected(check: Check, expected: Mapping[str, str]) -> str:
    """Return what to say of a failure if a check that this one needs is expected to fail.

    Args:
        check: The check that failed.
        expected: Reasons why checks fail, by name.
    """
    for need in NEEDS[check]:
        if name_of(need) in expected:
            return f"({name_of(need)}, which this needs, is expected to fail; if that is why, give a reason here too) "
    return ""


def unexpected_pass(reason: str) -> str:
    """Return what to say of a check that passes although it is expected to fail, for this reason."""
    return (
        f"it passes, and is expected to fail ({reason}); remove it from expected_failures, or from the method's record "
        "if it passes on all models"
    )


def run_check(check: Check, case: Case, method: str, config: Mapping[str, object]) -> CheckResult:
    """Run one check in a folder, a random state and settings of torch of its own, without warnings, in one thread.

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
        _as_usual(),
    ):
        try:
            reason = check(case, hooks.registry.named(method), config, Path(folder)) or ""
        except SkipTest as error:
            status, reason = "skipped", str(error)
        except Advice as error:
            status, reason = "advice", str(error)
        except (AssertionError, PluginError) as error:
            status, reason = "failed", str(error) or f"an assertion of {name_of(check)} failed: {check.__doc__}"
        except Exception as error:
            status, reason = "error", _explained(check, error)
    if status in _BAD:
        forget()
    return CheckResult(name_of(check), case.name, status, bounded(reason))


def _explained(check: Check, error: Exception) -> str:
    return f"{told(error)}. The check's law: {' '.join((check.__doc__ or '').split())}"


@contextmanager
def _as_usual() -> Iterator[None]:
    """Set torch's settings that a plugin may have changed, and compute with one thread.

    On small models more threads only wait for each other, for 5 times the CPU time measured.
    """
    threads, dtype, precision = torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)
