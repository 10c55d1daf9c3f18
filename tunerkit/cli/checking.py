"""The command `tunerkit check`: runs the kit on a method, and prints a list or table and each failure's sentence."""

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tunerkit.testing import CheckResult, check_method
from tunerkit.testing.known_cases import default_cases, named

_STYLES: Mapping[str, str] = {"passed": "green", "failed": "bold red", "error": "bold red", "skipped": "dim"}


def run(
    console: Console, method: str, config: Mapping[str, object], cases: Sequence[str], checks: Sequence[str]
) -> bool:
    """Run the checks of a method and print what they found.

    Args:
        console: Where to print.
        method: The method's name.
        config: Its settings.
        cases: The names of the cases; by default those of `check_method`.
        checks: The names of the checks; by default all.

    Returns:
        Whether no check failed.
    """
    models = named(cases) if cases else default_cases()
    results = [result for case in models for result in check_method(method, config, [case], checks=checks or None)]
    if len(models) == 1:
        for result in results:
            console.print(_line(result), soft_wrap=True)
    else:
        console.print(_table(results, [case.name for case in models]))
    bad = [result for result in results if result.status in ("failed", "error")]
    for result in bad:
        console.print(f"[bold red]{result.check}[/] on {escape(result.case)}: {escape(result.reason)}", soft_wrap=True)
    passed = sum(result.status == "passed" for result in results)
    skipped = sum(result.status == "skipped" for result in results)
    console.print(f"{escape(method)}: {passed} passed, {len(bad)} failed, {skipped} skipped")
    return not bad


def _line(result: CheckResult) -> str:
    """The status of a check, its name, and its remark; the sentences of failures come after all checks."""
    told = f": {escape(result.reason)}" if result.reason and result.status in ("passed", "skipped") else ""
    return f"[{_STYLES[result.status]}]{result.status:7}[/] {result.check}{told}"


def _table(results: Iterable[CheckResult], cases: Sequence[str]) -> Table:
    """One row for each check, one column for each case, and what passed or skipped checks say."""
    table = Table("check", *cases, "remark")
    rows: dict[str, dict[str, CheckResult]] = {}
    for result in results:
        rows.setdefault(result.check, {})[result.case] = result
    for check, found in rows.items():
        cells = [f"[{_STYLES[found[case].status]}]{found[case].status}[/]" for case in cases]
        told = dict.fromkeys(each.reason for each in found.values() if each.status in ("passed", "skipped"))
        table.add_row(check, *cells, escape("; ".join(filter(None, told))))
    return table
