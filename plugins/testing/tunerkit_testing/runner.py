"""Runs the checks of a method, root causes first: all at once, or each as a test of pytest."""

import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar
from unittest import SkipTest

import attrs
import torch

import tunerkit
from tunerkit import TunerkitError, hooks
from tunerkit.errors import PluginError, TargetError, bounded, closest, shown, warn
from tunerkit.plugin import AdapterConfig
from tunerkit_testing.blaming import told
from tunerkit_testing.cases import Advice, Case, Check, Trial, name_of
from tunerkit_testing.checks.order import BY_NAME, NEEDS
from tunerkit_testing.known_cases import default_cases, named
from tunerkit_testing.registering import registered

Config = AdapterConfig | Mapping[str, object] | None
Status = Literal["passed", "advice", "failed", "error", "skipped", "expected failure"]
Test = TypeVar("Test", bound=Callable[..., None])

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


# --- All checks at once -----------------------------------------------------------------------------------------------


def check_method(
    method: object,
    config: Config = None,
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
    wanted, expected = checks_named(checks), dict(expected_failures or {})
    checks_named(expected)
    with method_of(method) as name:
        settings, given = settings_of(name, config), default_cases() if cases is None else named(cases)
        expected = {**declared_failures(name), **expected}
        trials = [Trial(case, hooks.registry.named(name), settings, Path()) for case in given]
        return [result for trial in trials for result in _check_all(trial, wanted, expected, given)]


def _check_all(
    trial: Trial, checks: Sequence[Check], expected: Mapping[str, str], given: Sequence[Case]
) -> list[CheckResult]:
    if (reason := _unsuited(trial, given)) is not None:
        return [CheckResult(name_of(check), trial.case.name, "skipped", reason) for check in checks]
    results: list[CheckResult] = []
    blocked: dict[Check, str] = {}  # the check that failed first, by those that depend on it
    for check in checks:
        cause = next((blocked[need] for need in NEEDS[check] if need in blocked), None)
        if cause is not None:
            blocked[check] = cause
            results.append(CheckResult(name_of(check), trial.case.name, "skipped", f"because {cause} failed"))
            continue
        result = _judged(check, trial, expected)
        if result.status in _BAD:
            blocked[check] = result.check
        results.append(result)
    return results


# --- Each check as a test ---------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Shared:
    """What the checks of one case have in common, from one test to the next; another case or plugin takes its place."""

    of: tuple[object, ...] = ()
    kept: dict[object, Any] = attrs.field(factory=dict)

    def on(self, *of: object) -> dict[object, Any]:
        """Return what is kept of the same objects, or an empty mapping."""
        if [*map(id, of)] != [*map(id, self.of)]:
            self.of, self.kept = of, {}
        return self.kept


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
    config: Config
    given: Sequence[Case]
    expected: Mapping[str, str]
    shared: Shared = attrs.field(factory=Shared, repr=False)

    def __call__(self) -> None:
        """Run the check. If it fails, those that it needs are run too, since their failure would explain it.

        A check that passes and is expected to fail makes the test fail, as a strict xfail does. Advice is a warning.
        """
        import pytest  # the command `tunerkit check` works without it

        with method_of(self.method) as name:
            expected, trial = {**declared_failures(name), **self.expected}, self.trial(name)
            result = _judged(self.check, trial, expected)
            why_not = None
            if result.status in _BAD:
                why_not = _unsuited(trial, self.given) or _because(_cause(self.check, trial, expected))
        where = f"{result.check} on {result.case}"
        if result.status == "skipped" or why_not is not None:
            pytest.skip(why_not or result.reason)
        if result.status == "expected failure":
            pytest.xfail(result.reason)
        if result.status == "advice":
            warn(f"{where}: {result.reason}")
        elif result.status in _BAD or result.check in self.expected:
            pytest.fail(f"{where}: {result.reason}", pytrace=False)

    def trial(self, name: str) -> Trial:
        """Return what the check is given, for the method's name."""
        settings, method = settings_of(name, self.config), hooks.registry.named(name)
        # The next test may register another plugin with a method of this name.
        kept = self.shared.on(self.case, hooks.registry.loaded().owners[method].plugin)
        return Trial(self.case, method, settings, Path(), kept)


def _because(cause: str | None) -> str | None:
    return None if cause is None else f"because {cause} failed"


def _cause(check: Check, trial: Trial, expected: Mapping[str, str]) -> str | None:
    """Return the name of the first check that fails, and is not expected to, of all that a check needs."""
    for need in NEEDS[check]:
        if (cause := _cause(need, trial, expected)) is not None:
            return cause
        if name_of(need) not in expected and run_check(need, trial).status in _BAD:
            return name_of(need)
    return None


def parametrize_with_checks(
    method: object,
    config: Config = None,
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

    wanted, expected, shared = checks_named(checks), expected_failures or {}, Shared()
    checks_named(expected)
    given = [
        (each, each.name, ()) if isinstance(each, Case) else (each.values[0], each.id, each.marks)
        for one in (default_cases() if cases is None else cases)
        for each in (named([one]) if isinstance(one, str) else [one])
    ]
    models = [case for case, _, _ in given if case is not None]
    found = [
        pytest.param(
            BoundCheck(check, case, method, config, models, expected, shared), id=f"{id_}-{name_of(check)}", marks=marks
        )
        for case, id_, marks in given
        for check in wanted
    ]
    return lambda test: pytest.mark.parametrize("check", found)(test)


# --- One check --------------------------------------------------------------------------------------------------------


def _judged(check: Check, trial: Trial, expected: Mapping[str, str]) -> CheckResult:
    """Run a check, and judge what it found by the failures that are expected."""
    result = run_check(check, trial)
    bad, reason = result.status in _BAD, expected.get(result.check)
    if reason is not None and (bad or result.status == "advice"):
        return attrs.evolve(result, status="expected failure", reason=reason)
    if reason is not None and result.status == "passed":
        told = (
            f"it passes, and is expected to fail ({reason}); remove it from expected_failures, or from the method's "
            "record if it passes on all models"
        )
        return attrs.evolve(result, reason=told)
    need = next((name for name in map(name_of, NEEDS[check]) if name in expected), None)
    if bad and need is not None:
        told = f"({need}, which this needs, is expected to fail; if that is why, give a reason here too) "
        return attrs.evolve(result, reason=told + result.reason)
    return result


def run_check(check: Check, trial: Trial) -> CheckResult:
    """Run one check in a folder, a random state and settings of torch of its own, without warnings, in one thread."""
    status: Status = "passed"
    with (
        tempfile.TemporaryDirectory() as folder,
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(action="ignore"),
        _as_usual(),
    ):
        try:
            reason = check(attrs.evolve(trial, folder=Path(folder))) or ""
        except SkipTest as error:
            status, reason = "skipped", str(error)
        except Advice as error:
            status, reason = "advice", str(error)
        except (AssertionError, PluginError) as error:
            status, reason = "failed", str(error) or f"an assertion of {name_of(check)} failed: {check.__doc__}"
        except Exception as error:
            status = "error"
            reason = f"{told(error)}. The check's law: {' '.join((check.__doc__ or '').split())}"
    if status in _BAD:
        trial.kept.clear()  # it may have left a model merged, or otherwise changed
    return CheckResult(name_of(check), trial.case.name, status, bounded(reason))


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


def _unsuited(trial: Trial, given: Iterable[Case]) -> str | None:
    """Return why a method adapts nothing in a model, such as tied embeddings, and does in another that is given."""
    reason = _refusal(trial)
    if reason is None or all(_refusal(trial.on(each)) for each in given):
        return None
    return f"the method cannot be used on this model: {reason}"


def _refusal(trial: Trial) -> str | None:
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"), _as_usual():
            trial.wrapped()
    except TargetError as error:
        return bounded(str(error))
    except Exception:  # checks are about it
        return None
    return None


# --- What is given ----------------------------------------------------------------------------------------------------


@contextmanager
def method_of(plugin: object) -> Iterator[str]:
    """Give the name of a plugin's one method, which is registered for the length of the block.

    Args:
        plugin: What `tunerkit.method` returns, or any plugin with one method. A name is given back as it is.

    Raises:
        TunerkitError: It is no plugin, or has several methods.
    """
    if isinstance(plugin, str):
        yield plugin
        return
    given: Any = plugin
    names = [method.name for method in given.tunerkit_methods()] if hasattr(plugin, "tunerkit_methods") else []
    if len(names) != 1:
        raise TunerkitError(
            f"expected a method's name, or a plugin with one method, such as what @tunerkit.method returns; got "
            f"{type(plugin).__name__}" + (f" with the methods {', '.join(names)}: pass one of these" if names else "")
        )
    owner = hooks.registry.loaded().owners.get(names[0])
    with ExitStack() as stack:
        if owner is None or owner.plugin is not plugin:
            stack.enter_context(registered(plugin))
        yield names[0]


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
        checks_named(found)
    except TunerkitError as error:
        raise PluginError(f"{where}: {error}") from error
    return dict(found)


def settings_of(name: str, config: Config) -> dict[str, object]:
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


def checks_named(names: Iterable[str] | None) -> list[Check]:
    """Return checks by their names, in their order; without names all of them.

    Raises:
        TunerkitError: There is no check of a name; the message has the closest one.
    """
    given = [*BY_NAME] if names is None else list(names)
    for name in given:
        if name not in BY_NAME:
            hint = closest(name, BY_NAME) or f"; there are: {', '.join(BY_NAME)}"
            raise TunerkitError(f"no check named {name!r}{hint}")
    return [check for name, check in BY_NAME.items() if name in given]
