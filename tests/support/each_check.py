"""Parametrises a test over the short form of the kit, and over models and configs."""

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tunerkit_testing.conformance import CHECKS, Case, Check, name_of
from tunerkit_testing.runner import Shared

Test = TypeVar("Test", bound=Callable[..., None])


def each_check(cases: Iterable[Any], configs: Mapping[str, Mapping[str, object]]) -> Callable[[Test], Test]:
    """Run a test with each ``check`` on each ``case`` with each ``config``, which are its arguments.

    ::

        @each_check(matrix.cases(), {"plain": {"rank": 2}, "biases": {"rank": 2, "bias": "adapters"}})
        def test_conforms(check, case, config, tmp_path):
            check(case, "my-method", config, tmp_path)

    The checks of a case are trained once for all of them, as in `tunerkit_testing.check_method`, unless one fails.

    Args:
        cases: cases, or pytest parameters such as those of `matrix.cases`.
        configs: a method's settings, by the name that stands in the test's id.
    """
    shared = Shared()
    given = [pytest.param(case, id=name_of(case)) if isinstance(case, Case) else case for case in cases]

    def parametrized(test: Test) -> Test:
        for mark in (
            pytest.mark.parametrize("case", given),
            pytest.mark.parametrize("check", [_sharing(check, shared) for check in CHECKS], ids=name_of),
            pytest.mark.parametrize("config", configs.values(), ids=configs.keys()),
        ):
            test = mark(test)
        return test

    return parametrized


def _sharing(check: Check, shared: Shared) -> Check:
    """Return a check that uses what others on its case have computed with its config."""

    @wraps(check)
    def sharing(case: Case, method: str, config: Mapping[str, object], tmp_path: Path) -> None:
        kept = shared.on(case).setdefault(repr(sorted(config.items())), {})
        try:
            check(case, method, config, tmp_path, kept)
        except BaseException:
            kept.clear()
            raise

    return sharing
