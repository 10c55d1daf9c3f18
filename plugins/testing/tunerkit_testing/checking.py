"""The command `tunerkit check`: runs the kit on a method, and prints a list or table and each failure's sentence."""

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from operator import attrgetter
from pathlib import Path

import attrs
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from tunerkit.errors import TunerkitError
from tunerkit_testing import CheckResult, check_method
from tunerkit_testing.known_cases import default_cases, named

_STYLES: Mapping[str, str] = {
    "passed": "green",
    "advice": "cyan",
    "failed": "bold red",
    "error": "bold red",
    "skipped": "dim",
    "expected failure": "yellow",
}


def run(
    console: Console,
    method: str,
    config: Mapping[str, object],
    cases: Sequence[str],
    checks: Sequence[str],
    expected: Sequence[str] = (),
    lr: float | None = None,
) -> bool:
    """Run the checks of a method and print what they found.

    Args:
        console: Where to print.
        method: The method's name; or its plugin as an entry point has it, ``"my_package.loha:loha"``, or a module
            ``"my_package.gralora"``; one that is in no package ends in a colon, ``"gralora:"``.
        config: Its settings.
        cases: The names of the cases; by default those of `check_method`.
        checks: The names of the checks; by default all.
        expected: Checks that are expected to fail, each with its reason: ``"resumes=no state yet"``.
        lr: The learning rate at which the cases train, in place of their own.

    Returns:
        Whether no check failed, except as expected, and none passed that is expected to fail.

    Raises:
        TunerkitError: There is no check, case or plugin of a name, or an expected failure has no reason.
    """
    models = named(cases) if cases else default_cases()
    models = models if lr is None else [attrs.evolve(case, lr=lr) for case in models]
    reasons = _reasons(expected)
    results = check_method(_given(method), config, models, reasons, checks=checks or None)
    if len(models) == 1:
        for result in results:
            console.print(_line(result), soft_wrap=True)
    else:
        console.print(_table(results, [case.name for case in models]))
    unexpected = [result for result in results if result.status == "passed" and result.check in reasons]
    bad = [result for result in results if result.status in ("failed", "error") or result in unexpected]
    for result in bad:
        console.print(f"[bold red]{result.check}[/] on {escape(result.case)}: {escape(result.reason)}", soft_wrap=True)
    count = Counter(result.status for result in results if result not in bad)
    told = f"{count['passed']} passed, {len(bad)} failed, {count['skipped']} skipped"
    told += f", {count['advice']} with advice" if count["advice"] else ""
    told += f", {count['expected failure']} failed as expected" if count["expected failure"] else ""
    console.print(f"{escape(method.removesuffix(':'))}: {told}")
    return not bad


def _given(method: str) -> object:
    """Return a plugin that is named as in an entry point, from the current folder or an installed package."""
    module, colon, name = method.partition(":")
    if not colon and "." not in module:
        return method
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = import_module(module)
        return attrgetter(name)(found) if name else found
    except (ImportError, AttributeError) as error:
        raise TunerkitError(
            f"{method}: {error}; write MODULE:NAME, as in my_package.loha:loha, or "
            "MODULE alone, as in my_package.gralora, if its functions are the hooks"
        ) from error
    finally:
        sys.path.remove(str(Path.cwd()))


def _reasons(expected: Iterable[str]) -> dict[str, str]:
    found = {}
    for each in expected:
        check, _, reason = each.partition("=")
        if not reason.strip():
            raise TunerkitError(f"--expected-failure: write CHECK=REASON, as in 'resumes=no state yet'; got {each!r}")
        found[check.strip()] = reason.strip()
    return found


def _line(result: CheckResult) -> str:
    """The status of a check, its name, and its remark; the sentences of failures come after all checks."""
    told = f": {escape(result.reason)}" if result.reason and result.status not in ("failed", "error") else ""
    return f"[{_STYLES[result.status]}]{result.status:7}[/] {result.check}{told}"


def _table(results: Iterable[CheckResult], cases: Sequence[str]) -> Table:
    """One row for each check, one column for each case, and what all say but those that failed."""
    table = Table(*(Column(name, no_wrap=True) for name in ("check", *cases)), "remark")
    rows: dict[str, dict[str, CheckResult]] = {}
    for result in results:
        rows.setdefault(result.check, {})[result.case] = result
    for check, found in rows.items():
        cells = [f"[{_STYLES[found[case].status]}]{found[case].status}[/]" for case in cases]
        told = dict.fromkeys(each.reason for each in found.values() if each.status not in ("failed", "error"))
        table.add_row(check, *cells, escape("; ".join(filter(None, told))))
    return table
