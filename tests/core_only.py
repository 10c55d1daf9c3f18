"""A pytest plugin of `make test-core`: a test with the mark `core_only` that is skipped there fails.

`make test-all` leaves these tests out, so one that is skipped without plugins would run nowhere. This is checked on
Linux, which has what all of them need of the system. What waits for TUNERKIT_LONG may be skipped.
"""

import sys
from collections.abc import Generator

import pytest

NOWHERE = "a test marked core_only was skipped, so it runs nowhere; mark it everywhere, or don't skip it: {}"


def lost(reason: object, *, marks: bool) -> bool:
    """Whether a test that was skipped for this reason runs in no environment; ``marks``: it is marked core_only."""
    return marks and sys.platform == "linux" and "TUNERKIT_LONG" not in str(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn the skip of one test into a failure."""
    report = yield
    marks = item.get_closest_marker("core_only") is not None and item.get_closest_marker("everywhere") is None
    if report.skipped and not hasattr(report, "wasxfail") and lost(report.longrepr, marks=marks):
        report.outcome, report.longrepr = "failed", NOWHERE.format(report.longrepr)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Turn the skip of a whole file into a failure."""
    report = yield
    marks = isinstance(collector, pytest.Module) and "pytest.mark.core_only" in collector.path.read_text("utf-8")
    if report.skipped and lost(report.longrepr, marks=marks):
        report.outcome, report.longrepr = "failed", NOWHERE.format(report.longrepr)
    return report
